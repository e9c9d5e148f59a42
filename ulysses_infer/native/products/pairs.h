/* bfloat16 matrix products for dozens of rows or more. Each vector lane holds one input row, so no sum crosses lanes.
 *
 * The inputs are transposed first, in pairs of adjacent elements: a pair of all rows is contiguous. A weight row is then
 * read pair by pair, and each pair is broadcast to all lanes. Sums run over k in order, for any number of rows.
 */
#pragma once
#include <stdlib.h>

#include "product.h"

#define GROUP 32         /* weight rows whose sums are stored together: one cache line of outputs per input */
#define PANEL_TOGETHER 8 /* weight rows at a time; twice as many with a single vector of inputs */
#define MOST_VECTORS 3   /* of inputs at a time: then the sums fill the registers */
#define NEAR_BYTES (640 << 10) /* of inputs that fit in the L2 cache beside the weight */

/* Transposed inputs of `rows` rows, in blocks of 1 to MOST_VECTORS vectors: [block][width / 2][vectors * LANES]. */
struct pairs {
    uint32_t *values;
    int64_t rows, vectors, blocks;
};

static struct pairs pairs_of(uint32_t *values, int64_t rows) {
    const int64_t vectors = (rows + LANES - 1) / LANES;
    return (struct pairs){values, rows, vectors, (vectors + MOST_VECTORS - 1) / MOST_VECTORS};
}

/* The first vector of a block; blocks are of nearly equal size. */
static int64_t start_of(const struct pairs *x, int64_t block) { return x->vectors * block / x->blocks; }

/* Transpose inputs; lanes without a row are zero. */
static void transpose_inputs(const struct pairs *x, int64_t block, const bfloat16 *inputs, int64_t width,
                             int64_t stride) {
    const int64_t first = start_of(x, block), vectors = start_of(x, block + 1) - first, wide = vectors * LANES;
    for (int64_t v = 0; v < vectors; v++) {
        const int64_t row = (first + v) * LANES, rows = x->rows - row < LANES ? x->rows - row : LANES;
        uint32_t *to = x->values + (first * (width / 2) + v) * LANES;
        for (int64_t k = 0; k < width / 2; k += LANES, to += LANES * wide) {
            const int64_t count = width / 2 - k < LANES ? width / 2 - k : LANES;
            const __mmask16 there = (__mmask16)((1u << count) - 1);
            floats words[LANES];
            UNROLL for (int i = 0; i < LANES; i++)
                words[i] = i < rows ? (floats)_mm512_maskz_loadu_epi32(there, inputs + (row + i) * stride + 2 * k)
                                    : (floats){0};
            transpose_square(words);
            if (count == LANES)
                UNROLL for (int i = 0; i < LANES; i++) _mm512_storeu_ps(to + i * wide, (__m512)words[i]);
            else
                for (int i = 0; i < count; i++) _mm512_storeu_ps(to + i * wide, (__m512)words[i]);
        }
    }
}

/* Sums of `panel` weight rows, `bytes` apart, with `count` vectors of inputs: sums[panel][MOST_VECTORS * LANES].
 * Prefetches `fetched` rows from `next` on. */
INLINE void add_pairs_of(const uint32_t *values, const int count, const char *weight, int64_t bytes, const int panel,
                         int64_t width, const char *next, int fetched, float *sums) {
    __m512 held[2 * PANEL_TOGETHER][MOST_VECTORS];
    UNROLL for (int i = 0; i < panel; i++)
        UNROLL for (int v = 0; v < count; v++) held[i][v] = _mm512_setzero_ps();
    for (int64_t first = 0; first < width / 2; first += LINE / 4) {
        const int64_t stop = width / 2 - first < LINE / 4 ? width / 2 : first + LINE / 4;
        for (int i = 0; i < fetched; i++) __builtin_prefetch(next + i * bytes + first * 4, 0, 2);
        for (int64_t k = first; k < stop; k++, values += count * LANES) {
            __m512bh rows[MOST_VECTORS];
            UNROLL for (int v = 0; v < count; v++) rows[v] = (__m512bh)_mm512_loadu_si512(values + v * LANES);
            UNROLL for (int i = 0; i < panel; i++) {
                int pair;
                memcpy(&pair, weight + i * bytes + k * 4, sizeof pair);
                __m512bh both = (__m512bh)_mm512_set1_epi32(pair);
                UNROLL for (int v = 0; v < count; v++) held[i][v] = _mm512_dpbf16_ps(held[i][v], rows[v], both);
            }
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

/* Store the sums of GROUP weight rows, [GROUP][MOST_VECTORS * LANES], in the outputs of `rows` inputs. */
static void put_group(const float *sums, const float *bias, int64_t rows, bfloat16 *to, int64_t stride) {
    const int64_t wide = MOST_VECTORS * LANES;
    for (int64_t v = 0; v * LANES < rows; v++) {
        const int64_t left = rows - v * LANES < LANES ? rows - v * LANES : LANES;
        for (int64_t part = 0; part < GROUP; part += LANES) {
            const float *from = sums + part * wide + v * LANES;
            bfloat16 *out = to + v * LANES * stride + part;
            floats square[LANES];
            UNROLL for (int i = 0; i < LANES; i++)
                square[i] = (floats)_mm512_loadu_ps(from + i * wide) + bias[part + i];
            transpose_square(square);
            UNROLL for (int t = 0; t < LANES; t++)
                if (t < left) give(out + t * stride, square[t], BFLOAT16);
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

/* Rows n .. n + GROUP of the weight, or fewer at the end, with a block of the inputs. */
static void group_of(const struct product *p, const struct pairs *x, int64_t block, int64_t n) {
    const int64_t bytes = p->weight_stride * sizeof(bfloat16), left = p->num_outputs - n, first = start_of(x, block);
    const int64_t count = left < GROUP ? left : GROUP, vectors = start_of(x, block + 1) - first;
    const int64_t last = x->rows - first * LANES, rows = last < vectors * LANES ? last : vectors * LANES;
    const uint32_t *values = x->values + first * LANES * (p->width / 2);
    const char *weight = p->weight + n * bytes;
    float bias[GROUP] = {0}, sums[GROUP * MOST_VECTORS * LANES];
    for (int64_t i = 0; i < count; i++) bias[i] = bias_of(p, n + i, BFLOAT16);
#define TAKE(panel)                                                                                             \
    for (; i + panel <= count; i += panel)                                                                      \
        add_block(values, vectors, weight + i * bytes, bytes, panel, p->width, weight + (i + panel) * bytes,    \
                  block ? 0 : (int)(left - i - panel < panel ? left - i - panel : panel), sums + i * MOST_VECTORS * LANES)
    int64_t i = 0;
    if (vectors == 1) TAKE(2 * PANEL_TOGETHER);
    TAKE(PANEL_TOGETHER);
    TAKE(1);
#undef TAKE
    bfloat16 *to = (bfloat16 *)p->outputs + first * LANES * p->outputs_stride + n;
    if (count == GROUP)
        put_group(sums, bias, rows, to, p->outputs_stride);
    else
        put_rest(sums, bias, rows, to, p->outputs_stride, count);
}

/* Input rows that are transposed at a time: as many whole blocks as fit in the L2 cache. */
static int64_t rows_at_a_time(int64_t width) {
    const int64_t block = MOST_VECTORS * LANES, fit = NEAR_BYTES / (width * (int64_t)sizeof(bfloat16)) / block * block;
    return fit > block ? fit : block;
}

/* Returns 0 if there is no memory for the transposed inputs. */
static int multiply_pairs(const struct product *p) {
    const int64_t most = rows_at_a_time(p->width), held = p->num_rows < most ? p->num_rows : most;
    uint32_t *values = aligned_alloc(LINE, (held + LANES - 1) / LANES * LANES * p->width * sizeof(bfloat16));
    if (!values) return 0;
#pragma omp parallel if (is_large(p))
    for (int64_t row = 0; row < p->num_rows; row += most) {
        const struct pairs x = pairs_of(values, p->num_rows - row < most ? p->num_rows - row : most);
        struct product part = *p;
        part.inputs += row * p->inputs_stride * sizeof(bfloat16);
        part.outputs += row * p->outputs_stride * sizeof(bfloat16);
#pragma omp for schedule(static)
        for (int64_t block = 0; block < x.blocks; block++)
            transpose_inputs(&x, block, (const bfloat16 *)part.inputs, p->width, p->inputs_stride);
#pragma omp for schedule(static)
        for (int64_t group = 0; group < (p->num_outputs + GROUP - 1) / GROUP; group++)
            for (int64_t block = 0; block < x.blocks; block++) group_of(&part, &x, block, group * GROUP);
    }
    free(values);
    return 1;
}
