/* Products of a dozen rows and more, in bfloat16: a lane of a vector is an input row, so that no sum crosses lanes.
 *
 * The inputs are turned round first: pairs of neighbouring numbers of all rows lie side by side. A weight row is then
 * read pair by pair, each pair sent to all lanes. Sums run over k in order, whatever the number of rows.
 */
#pragma once
#include <stdlib.h>

#include "vector.h"

#define GROUP 16         /* weight rows whose sums are put out together */
#define PANEL_TOGETHER 8 /* weight rows at a time */
#define MOST_VECTORS 3   /* of inputs at a time: with those, sums fill the registers */
#define FEWEST_ROWS_TOGETHER 28 /* measured: below, lanes without a row cost more than sums across lanes */

/* Inputs turned round, `rows` of them, in blocks of 1 to MOST_VECTORS vectors: [block][width / 2][vectors * LANES]. */
struct pairs {
    uint32_t *values;
    int64_t rows, vectors, blocks;
};

static struct pairs pairs_of(uint32_t *values, int64_t rows) {
    const int64_t vectors = (rows + LANES - 1) / LANES;
    return (struct pairs){values, rows, vectors, (vectors + MOST_VECTORS - 1) / MOST_VECTORS};
}

/* The first vector of a block: they are of nearly equal size. */
static int64_t start_of(const struct pairs *x, int64_t block) { return x->vectors * block / x->blocks; }

/* Turn inputs round; lanes without a row are zero. */
static void turn(const struct pairs *x, int64_t block, const bfloat16 *inputs, int64_t width, int64_t stride) {
    const int64_t first = start_of(x, block), vectors = start_of(x, block + 1) - first;
    for (int64_t v = 0; v < vectors; v++) {
        const int64_t row = (first + v) * LANES, left = x->rows - row;
        const __mmask16 there = left < LANES ? (__mmask16)((1u << left) - 1) : 0xffff;
        int32_t offsets[LANES];
        for (int i = 0; i < LANES; i++) offsets[i] = i < left ? (int32_t)(i * stride * sizeof *inputs) : 0;
        const __m512i index = _mm512_loadu_si512(offsets);
        const char *from = (const char *)(inputs + row * stride);
        uint32_t *to = x->values + (first * (width / 2) + v) * LANES;
        for (int64_t k = 0; k < width / 2; k++, from += 4, to += vectors * LANES)
            _mm512_storeu_si512(to, _mm512_mask_i32gather_epi32(_mm512_setzero_si512(), there, index, from, 1));
    }
}

/* Sums of `panel` weight rows, `bytes` apart, with `count` vectors of inputs: sums[panel][MOST_VECTORS * LANES]. Lines of
 * `fetched` rows from `next` on are fetched meanwhile. */
INLINE void add_pairs_of(const uint32_t *values, const int count, const char *weight, int64_t bytes, const int panel,
                         int64_t width, const char *next, int fetched, float *sums) {
    __m512 held[PANEL_TOGETHER][MOST_VECTORS];
    UNROLL for (int i = 0; i < panel; i++)
        UNROLL for (int v = 0; v < count; v++) held[i][v] = _mm512_setzero_ps();
    for (int64_t k = 0; k < width / 2; k++, values += count * LANES) {
        if (k % (LINE / 4) == 0)
            for (int i = 0; i < fetched; i++) __builtin_prefetch(next + i * bytes + k * 4, 0, 2);
        __m512bh rows[MOST_VECTORS];
        UNROLL for (int v = 0; v < count; v++) rows[v] = (__m512bh)_mm512_loadu_si512(values + v * LANES);
        UNROLL for (int i = 0; i < panel; i++) {
            int pair;
            memcpy(&pair, weight + i * bytes + k * 4, sizeof pair);
            __m512bh both = (__m512bh)_mm512_set1_epi32(pair);
            UNROLL for (int v = 0; v < count; v++) held[i][v] = _mm512_dpbf16_ps(held[i][v], rows[v], both);
        }
    }
    UNROLL for (int i = 0; i < panel; i++)
        UNROLL for (int v = 0; v < count; v++)
            _mm512_storeu_ps(sums + (i * MOST_VECTORS + v) * LANES, held[i][v]);
}

/* The same for 1 to MOST_VECTORS vectors. */
INLINE void add_block(const uint32_t *values, int64_t vectors, const char *weight, int64_t bytes, const int panel,
                      int64_t width, const char *next, int fetched, float *sums) {
    switch (vectors) {
        case 1: add_pairs_of(values, 1, weight, bytes, panel, width, next, fetched, sums); break;
        case 2: add_pairs_of(values, 2, weight, bytes, panel, width, next, fetched, sums); break;
        default: add_pairs_of(values, 3, weight, bytes, panel, width, next, fetched, sums);
    }
}

/* The sums of GROUP weight rows, [GROUP][MOST_VECTORS * LANES], to where each of `rows` inputs has its outputs. */
static void put_group(const float *sums, const float *bias, int64_t rows, bfloat16 *to, int64_t stride) {
    const int64_t wide = MOST_VECTORS * LANES;
    /* From the numbers of two weight rows, one after the other, to pairs of them. */
    uint16_t places[2 * LANES];
    for (int i = 0; i < LANES; i++) places[2 * i] = i, places[2 * i + 1] = LANES + i;
    const __m512i interleave = _mm512_loadu_si512(places);
    const __m256i column = _mm256_mullo_epi32(_mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7), _mm256_set1_epi32(LANES));
    for (int64_t v = 0; v * LANES < rows; v++) {
        uint32_t pairs[GROUP / 2][LANES];
        for (int i = 0; i < GROUP; i += 2) {
            const float *from = sums + i * wide + v * LANES;
            __m512 first = _mm512_add_ps(_mm512_loadu_ps(from), _mm512_set1_ps(bias[i]));
            __m512 second = _mm512_add_ps(_mm512_loadu_ps(from + wide), _mm512_set1_ps(bias[i + 1]));
            __m512i both = (__m512i)_mm512_cvtne2ps_pbh(second, first);
            _mm512_storeu_si512(pairs[i / 2], _mm512_permutexvar_epi16(interleave, both));
        }
        for (int64_t t = 0; t < LANES && v * LANES + t < rows; t++) {
            __m256i outputs = _mm256_i32gather_epi32((const int *)&pairs[0][t], column, 4);
            _mm256_storeu_si256((__m256i *)(to + (v * LANES + t) * stride), outputs);
        }
    }
}

/* The same for the last `count` weight rows, fewer than GROUP. */
static void put_rest(const float *sums, const float *bias, int64_t rows, bfloat16 *to, int64_t stride,
                     int64_t count) {
    for (int64_t t = 0; t < rows; t++)
        for (int64_t i = 0; i < count; i++)
            to[t * stride + i] = bfloat16_of(sums[i * MOST_VECTORS * LANES + t] + bias[i]);
}
