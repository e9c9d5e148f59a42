/* Products of inputs, quantised row by row and segment by segment, with weights as 8-bit integers.
 *
 * outputs[t, n] = sum over segments s of scale(t, s) * (scale(n, s) * dot(t, n, s) + minimum(n, s) * sum(t, s)), where
 * dot is of integers, and sum that of the inputs' integers. A row's result does not depend on the other rows.
 */
#pragma once
#include "integer_panels.h"

#if REGISTERS == 32
#define TILE_ROWS 6
#else
#define TILE_ROWS 4
#endif
#define BATCH_ROWS (80 * TILE_ROWS) /* whose sums are kept beside a panel */

struct product {
    const struct stored *weight;
    const char *inputs, *bias; /* bias may be null */
    char *outputs;
    int64_t num_rows, inputs_stride, outputs_stride; /* elements from one row to the next */
    enum type type;
    const struct segment *segments;
    int64_t num_segments;
};

INLINE int64_t padded(int64_t count) { return (count + LINE - 1) / LINE * LINE + LINE; }

INLINE void put(const struct product *p, int64_t t, int64_t n, float value) {
    const int64_t place = t * p->outputs_stride + n;
    if (p->type == FLOAT32)
        ((float *)p->outputs)[place] = value + (p->bias ? ((const float *)p->bias)[n] : 0);
    else
        ((bfloat16 *)p->outputs)[place] = bfloat16_of(value + (p->bias ? float_of(((const bfloat16 *)p->bias)[n]) : 0));
}

/* Quantised inputs, in blocks of nearly equal numbers of rows, at most TILE_ROWS. */
struct packed_inputs {
    uint32_t *operands;   /* of each block: [operands][rows] */
    float *scales, *sums; /* of each block: [segments][rows]; sums are those of the inputs themselves */
    int64_t rows, blocks, num_operands;
};

INLINE int64_t first_row(const struct packed_inputs *x, int64_t block) { return x->rows * block / x->blocks; }

/* Quantise and pack the rows of one block, the first of which is row `t` of the product. `codes`: room for a row. */
static void pack_block(const struct product *p, const struct cut *cut, const struct packed_inputs *x, int64_t block,
                       int64_t t, int8_t *codes) {
    const int64_t first = first_row(x, block), rows = first_row(x, block + 1) - first, size = size_of(p->type);
    for (int64_t r = 0; r < rows; r++)
        for (int64_t s = 0; s < cut->count; s++) {
            const int64_t start = cut->segments[s].start, count = cut->segments[s].stop - start;
            const char *from = p->inputs + ((t + first + r) * p->inputs_stride + start) * size;
            const int64_t place = first * cut->count + s * rows + r;
            int32_t sum;
            x->scales[place] = quantise(from, count, p->type, codes, &sum);
            x->sums[place] = x->scales[place] * (float)sum;
            memset(codes + count, 0, 8);
            pack_inputs(codes, count, cut->kind, x->operands + first * x->num_operands + cut->first[s] * rows + r, rows);
        }
}

/* The operands of VECTORS vectors of words from `w` on. */
INLINE void load_operands(const uint32_t *w, enum kind kind, words to[2][VECTORS]) {
    UNROLL for (int v = 0; v < VECTORS; v++) {
        words read, found[2];
        memcpy(&read, w + v * LANES, sizeof read);
        to[0][v] = read;
        if (kind == NIBBLES) unpack(read, kind, found), to[0][v] = found[0], to[1][v] = found[1];
    }
}

/* Add to whole[rows][VECTORS] the products of `count` words of a panel. */
INLINE void add_words(const uint32_t *w, const uint32_t *x, int64_t count, const int rows, const enum kind kind,
                      integers whole[TILE_ROWS][VECTORS]) {
    const int operands = kind == NIBBLES ? 2 : 1;
    for (int64_t k = 0; k < count; k++, w += OUTPUTS, x += operands * rows) {
        words weights[2][VECTORS];
        load_operands(w, kind, weights);
        UNROLL for (int o = 0; o < operands; o++)
            UNROLL for (int r = 0; r < rows; r++) {
                const words input = (words){0} + x[o * rows + r];
                UNROLL for (int v = 0; v < VECTORS; v++) whole[r][v] = dot(whole[r][v], input, weights[o][v]);
            }
    }
}

/* The same of nibbles, by sums of 16 bits. */
INLINE void add_narrow_words(const uint32_t *w, const uint32_t *x, int64_t count, const int rows,
                             integers whole[TILE_ROWS][VECTORS]) {
    for (int64_t k = 0; k < count;) {
        shorts narrow[TILE_ROWS][VECTORS];
        UNROLL for (int r = 0; r < rows; r++)
            UNROLL for (int v = 0; v < VECTORS; v++) narrow[r][v] = (shorts){0};
        const int64_t stop = k + NARROW_WORDS < count ? k + NARROW_WORDS : count;
        for (; k < stop; k++, w += OUTPUTS, x += 2 * rows) {
            words weights[2][VECTORS];
            load_operands(w, NIBBLES, weights);
            UNROLL for (int o = 0; o < 2; o++)
                UNROLL for (int r = 0; r < rows; r++) {
                    const words input = (words){0} + x[o * rows + r];
                    UNROLL for (int v = 0; v < VECTORS; v++)
                        narrow[r][v] = narrow_dot(narrow[r][v], input, weights[o][v]);
                }
        }
        UNROLL for (int r = 0; r < rows; r++)
            UNROLL for (int v = 0; v < VECTORS; v++)
                whole[r][v] = pair_dot(whole[r][v], (words)narrow[r][v], (words){0} + 0x00010001);
    }
}

/* Segments s .. end of a panel times a block of `rows` rows, added to sums[rows][OUTPUTS]. */
INLINE void tile(const struct panel *w, const struct cut *cut, int64_t s, int64_t end, const uint32_t *operands,
                 const float *x_scales, const float *x_sums, const int rows, const enum kind kind, float *sums) {
    floats held[TILE_ROWS][VECTORS];
    UNROLL for (int r = 0; r < rows; r++) memcpy(held[r], sums + r * OUTPUTS, sizeof held[r]);
    for (int64_t at = s; at < end; at++) {
        const int64_t word = first_word(cut, s, at), count = first_word(cut, s, at + 1) - word;
        const uint32_t *weights = w->words + word * OUTPUTS, *x = operands + cut->first[at] * rows;
        const int64_t place = (cut->segments[at].group - cut->segments[s].group) * OUTPUTS;
        integers whole[TILE_ROWS][VECTORS];
        UNROLL for (int r = 0; r < rows; r++)
            UNROLL for (int v = 0; v < VECTORS; v++) whole[r][v] = (integers){0};
        if (NARROW_SUMS && kind == NIBBLES)
            add_narrow_words(weights, x, count, rows, whole);
        else
            add_words(weights, x, count, rows, kind, whole);
        UNROLL for (int v = 0; v < VECTORS; v++) {
            const floats scale = take(w->scales + place + v * LANES, FLOAT32);
            const floats minimum = take(w->minima + place + v * LANES, FLOAT32);
            UNROLL for (int r = 0; r < rows; r++) {
                held[r][v] += __builtin_convertvector(whole[r][v], floats) * x_scales[at * rows + r] * scale;
                held[r][v] += minimum * x_sums[at * rows + r];
            }
        }
    }
    UNROLL for (int r = 0; r < rows; r++) memcpy(sums + r * OUTPUTS, held[r], sizeof held[r]);
}

INLINE void tile_of(const struct panel *w, const struct cut *cut, int64_t s, int64_t end, const uint32_t *operands,
                    const float *scales, const float *x_sums, int64_t rows, const enum kind kind, float *sums) {
    switch (rows) {
        case 1: tile(w, cut, s, end, operands, scales, x_sums, 1, kind, sums); break;
        case 2: tile(w, cut, s, end, operands, scales, x_sums, 2, kind, sums); break;
        case 3: tile(w, cut, s, end, operands, scales, x_sums, 3, kind, sums); break;
        case 4: tile(w, cut, s, end, operands, scales, x_sums, 4, kind, sums); break;
#if TILE_ROWS == 6
        case 5: tile(w, cut, s, end, operands, scales, x_sums, 5, kind, sums); break;
        case 6: tile(w, cut, s, end, operands, scales, x_sums, 6, kind, sums); break;
#endif
    }
}

/* A panel times all rows of `x`, added to sums[rows][OUTPUTS]. */
static void add_panel(const struct panel *w, const struct cut *cut, int64_t s, int64_t end,
                      const struct packed_inputs *x, float *sums) {
    for (int64_t block = 0; block < x->blocks; block++) {
        const int64_t first = first_row(x, block), rows = first_row(x, block + 1) - first;
        const uint32_t *operands = x->operands + first * x->num_operands;
        const float *scales = x->scales + first * cut->count, *x_sums = x->sums + first * cut->count;
        if (HAS_NIBBLES && cut->kind == NIBBLES)
            tile_of(w, cut, s, end, operands, scales, x_sums, rows, NIBBLES, sums + first * OUTPUTS);
        else
            tile_of(w, cut, s, end, operands, scales, x_sums, rows, BYTES, sums + first * OUTPUTS);
    }
}

/* Store sums[rows][OUTPUTS] as outputs n .. n + count of the rows from `t` on. */
static void put_sums(const struct product *p, int64_t t, int64_t rows, int64_t n, int64_t count, const float *sums) {
    const size_t size = size_of(p->type);
    for (int64_t part = 0; part < count; part += LANES) {
        const int some = count - part < LANES ? (int)(count - part) : LANES;
        floats bias = {0};
        if (p->bias) bias = take_some(p->bias + (n + part) * size, some, p->type);
        for (int64_t r = 0; r < rows; r++) {
            const floats sum = take(sums + r * OUTPUTS + part, FLOAT32) + bias;
            give_some(p->outputs + ((t + r) * p->outputs_stride + n + part) * size, sum, some, p->type);
        }
    }
}
