/* Products of inputs, quantised row by row and segment by segment, with weights as 8-bit integers.
 *
 * outputs[t, n] = sum over segments s of scale(t, s) * (scale(n, s) * dot(t, n, s) + minimum(n, s) * sum(t, s)), where
 * dot is of integers, and sum that of the inputs' integers. A row's result does not depend on the other rows.
 */
#pragma once
#include "matrix_dots.h"

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
    int32_t *offsets;     /* alike: what WEIGHT_OFFSET adds to the dot products, negative */
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
            x->sums[place] = x->scales[place] * (float)sum, x->offsets[place] = -WEIGHT_OFFSET * sum;
            memset(codes + count, 0, 8);
            pack_inputs(codes, count, cut->kind, x->operands + first * x->num_operands + cut->first[s] * rows + r, rows);
        }
}

/* Add to whole[rows][VECTORS] the products of `count` words of a panel. */
INLINE void add_words(const uint32_t *w, const uint32_t *x, int64_t count, const int rows, const enum kind kind,
                      integers whole[TILE_ROWS][VECTORS]) {
    const int operands = kind == NIBBLES ? 2 : 1;
#if HAS_MATRIX_DOTS
    if (rows > 1) {
        const int64_t done = add_matrix_words(w, x, count, rows, kind, whole);
        w += done * OUTPUTS, x += done * operands * rows, count -= done;
    }
#endif
    UNROLL_SOME for (int64_t k = 0; k < count; k++, w += OUTPUTS, x += operands * rows) {
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

/* How a tile is computed: of_channels: bytes with one scale per output, with which the sums are multiplied at last. */
enum form { OF_CHANNELS, OF_BYTES, OF_NIBBLES };

INLINE enum form form_of(const struct stored *w, const struct cut *cut) {
    if (HAS_NIBBLES && cut->kind == NIBBLES) return OF_NIBBLES;
    return w->group_size || w->float_zeros ? OF_BYTES : OF_CHANNELS;
}

/* Segments s .. end of a panel times the block of `x` that begins with row `first`, added to sums[rows][OUTPUTS]. */
INLINE void tile(const struct panel *w, const struct cut *cut, int64_t s, int64_t end, const struct packed_inputs *x,
                 int64_t first, const int rows, const enum form form, float *sums) {
    const enum kind kind = form == OF_NIBBLES ? NIBBLES : BYTES;
    const float *x_scales = x->scales + first * cut->count, *x_sums = x->sums + first * cut->count;
    const int32_t *offsets = x->offsets + first * cut->count;
    const uint32_t *inputs = x->operands + first * x->num_operands;
    floats held[TILE_ROWS][VECTORS];
    UNROLL for (int r = 0; r < rows; r++) memcpy(held[r], sums + r * OUTPUTS, sizeof held[r]);
    for (int64_t at = s; at < end; at++) {
        const int64_t word = first_word(cut, s, at), count = first_word(cut, s, at + 1) - word;
        const uint32_t *weights = w->words + word * OUTPUTS;
        const uint32_t *operands = inputs + cut->first[at] * rows;
        const int64_t group = (cut->segments[at].group - cut->segments[s].group) * OUTPUTS;
        integers whole[TILE_ROWS][VECTORS];
        UNROLL for (int r = 0; r < rows; r++)
            UNROLL for (int v = 0; v < VECTORS; v++)
                whole[r][v] = (integers){0} + (form == OF_CHANNELS && WEIGHT_OFFSET != 0 ? offsets[at * rows + r] : 0);
        if (NARROW_SUMS && kind == NIBBLES)
            add_narrow_words(weights, operands, count, rows, whole);
        else
            add_words(weights, operands, count, rows, kind, whole);
        UNROLL for (int v = 0; v < VECTORS; v++) {
            floats scale, minimum;
            if (form != OF_CHANNELS) scale = take(w->scales + group + v * LANES, FLOAT32);
            if (form != OF_CHANNELS) minimum = take(w->minima + group + v * LANES, FLOAT32);
            UNROLL for (int r = 0; r < rows; r++) {
                const floats sum = __builtin_convertvector(whole[r][v], floats) * x_scales[at * rows + r];
                /* Without a barrier the compiler adds both products first, which takes one more instruction. */
                if (form != OF_CHANNELS) held[r][v] = in_register(held[r][v] + minimum * x_sums[at * rows + r]);
                held[r][v] += form == OF_CHANNELS ? sum : sum * scale;
            }
        }
    }
    UNROLL for (int r = 0; r < rows; r++) memcpy(sums + r * OUTPUTS, held[r], sizeof held[r]);
}

/* A panel times all rows of `x`, added to sums[rows][OUTPUTS]. */
INLINE void add_panel(const struct panel *w, const struct cut *cut, int64_t s, int64_t end,
                      const struct packed_inputs *x, const enum form form, float *sums) {
    for (int64_t block = 0; block < x->blocks; block++) {
        const int64_t first = first_row(x, block);
        float *to = sums + first * OUTPUTS;
        switch (first_row(x, block + 1) - first) {
            case 1: tile(w, cut, s, end, x, first, 1, form, to); break;
            case 2: tile(w, cut, s, end, x, first, 2, form, to); break;
            case 3: tile(w, cut, s, end, x, first, 3, form, to); break;
            case 4: tile(w, cut, s, end, x, first, 4, form, to); break;
#if REGISTERS == 32
            case 5: tile(w, cut, s, end, x, first, 5, form, to); break;
            case 6: tile(w, cut, s, end, x, first, 6, form, to); break;
#endif
        }
    }
}

/* The same for each form; of_channels: when the last segment has been added, sums are multiplied with the scales. */
static void add_channels(const struct panel *w, const struct cut *cut, int64_t s, int64_t end,
                         const struct packed_inputs *x, float *sums) {
    add_panel(w, cut, s, end, x, OF_CHANNELS, sums);
    for (int64_t r = 0; r < x->rows && end == cut->count; r++, sums += OUTPUTS)
        for (int64_t n = 0; n < OUTPUTS; n++) sums[n] *= w->scales[n];
}

static void add_bytes(const struct panel *w, const struct cut *cut, int64_t s, int64_t end,
                      const struct packed_inputs *x, float *sums) {
    add_panel(w, cut, s, end, x, OF_BYTES, sums);
}

static void add_nibbles(const struct panel *w, const struct cut *cut, int64_t s, int64_t end,
                        const struct packed_inputs *x, float *sums) {
    add_panel(w, cut, s, end, x, OF_NIBBLES, sums);
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
