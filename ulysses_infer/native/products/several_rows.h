/* Products of several rows: a vector of weights is converted once, and multiplied with up to SEVERAL_ROWS rows of inputs.
 *
 * Lanes are consecutive inputs, as in few_rows.h, and sums have the same order. Inputs are converted to float32 first and
 * interleaved, so that a weight's vector meets those of all rows at one place, in the L1 cache.
 */
#pragma once
#include <stdlib.h>

#include "few_rows.h"

#define SEVERAL_ROWS (REGISTERS / 2) /* at most, whose sums are in registers */
#define SEVERAL_VECTORS 64           /* of a row of the weight at a time: as many of each input stay in the L1 cache */
#define SEVERAL_OUTPUTS 16           /* of a task, whole vectors */

/* Inputs in float32: [block][vectors of a row][rows of the block][LANES]; what is not there is zero. */
struct interleaved {
    float *values;
    int64_t rows, blocks, vectors;
    int64_t wide; /* rows of a block, with those that are zero */
};

/* Rows that sums are kept of, for `rows` rows. */
INLINE int64_t wide_of(int64_t rows) { return rows <= SEVERAL_ROWS / 2 ? SEVERAL_ROWS / 2 : (rows + 1) / 2 * 2; }

/* The layout of a product's inputs, without memory. */
INLINE struct interleaved interleaved_of(const struct product *p) {
    const int64_t blocks = (p->num_rows + SEVERAL_ROWS - 1) / SEVERAL_ROWS, rows = (p->num_rows + blocks - 1) / blocks;
    return (struct interleaved){0, rows, blocks, (p->width + LANES - 1) / LANES, wide_of(rows)};
}

INLINE int64_t block_size_of(const struct interleaved *x) { return x->vectors * x->wide * LANES; }

/* Convert a row of inputs. */
INLINE void interleave_row(const struct product *p, const struct interleaved *x, int64_t row, enum type type) {
    float *to = x->values + row / x->rows * block_size_of(x) + row % x->rows * LANES;
    const char *from = p->inputs + row * p->inputs_stride * size_of(type);
    for (int64_t k = 0; k < p->width; k += LANES, to += x->wide * LANES) {
        const int64_t left = p->width - k;
        const char *part = from + k * size_of(type);
        const floats values = left < LANES ? take_some(part, (int)left, type) : take(part, type);
        memcpy(to, &values, sizeof values);
    }
}

/* held[wide] += a vector of weights times those of the inputs. */
INLINE void add_vector(floats held[SEVERAL_ROWS], floats weights, const float *x, const int wide) {
    const floats w = in_register(weights);
    UNROLL for (int r = 0; r < wide; r++) held[r] = multiply_add(held[r], w, take(x + r * LANES, FLOAT32), FLOAT32);
}

/* sums[wide] += `width` elements of a weight row times the inputs from `x` on. Prefetches as many at `ahead`. */
INLINE void add_several(const char *weight, const float *x, int64_t width, const char *ahead, const int wide,
                        floats *sums, enum type type) {
    const int64_t size = size_of(type), line = LINE / size;
    floats held[SEVERAL_ROWS];
    UNROLL for (int r = 0; r < wide; r++) held[r] = sums[r];
    int64_t k = 0;
    for (; k + line <= width; k += line) {
        __builtin_prefetch(ahead + k * size, 0, 2);
        UNROLL for (int64_t i = 0; i < line; i += LANES)
            add_vector(held, take(weight + (k + i) * size, type), x + (k + i) * wide, wide);
    }
    for (; k + LANES <= width; k += LANES) add_vector(held, take(weight + k * size, type), x + k * wide, wide);
    if (k < width) add_vector(held, take_some(weight + k * size, (int)(width - k), type), x + k * wide, wide);
    UNROLL for (int r = 0; r < wide; r++) sums[r] = held[r];
}

/* Store the sums of outputs n .. n + count with a block of rows, the first of which is `row`. */
INLINE void put_several(const struct product *p, int64_t row, int64_t rows, int64_t n, int64_t count,
                        floats (*sums)[SEVERAL_ROWS], enum type type) {
    const size_t size = size_of(type);
    for (int64_t r = 0; r < rows; r++) {
        float four[SEVERAL_OUTPUTS];
        for (int i = 0; i < SEVERAL_OUTPUTS; i += 4)
            sum_four(four + i, sums[i][r], sums[i + 1][r], sums[i + 2][r], sums[i + 3][r]);
        for (int64_t i = 0; i < count; i += LANES) {
            const int some = count - i < LANES ? (int)(count - i) : LANES;
            floats bias = {0};
            if (p->bias) bias = take_some(p->bias + (n + i) * size, some, type);
            char *to = p->outputs + ((row + r) * p->outputs_stride + n + i) * size;
            give_some(to, take(four + i, FLOAT32) + bias, some, type);
        }
    }
}

/* All rows with SEVERAL_OUTPUTS outputs from `n` on, or fewer at the end. */
INLINE void several_outputs(const struct product *p, const struct interleaved *x, int64_t n, const int wide,
                            enum type type) {
    const int64_t left = p->num_outputs - n, count = left < SEVERAL_OUTPUTS ? left : SEVERAL_OUTPUTS;
    const int64_t depth = SEVERAL_VECTORS * LANES, bytes = p->weight_stride * size_of(type);
    for (int64_t block = 0; block < x->blocks; block++) {
        floats sums[SEVERAL_OUTPUTS][SEVERAL_ROWS];
        memset(sums, 0, sizeof sums);
        for (int64_t k = 0; k < p->width; k += depth) {
            const int64_t width = p->width - k < depth ? p->width - k : depth;
            const float *values = x->values + block * block_size_of(x) + k * wide;
            const int64_t size = size_of(type);
            /* What is read next: the next part of these rows, or, after the last, the first part of the next rows. */
            int64_t ahead = k + width < p->width ? depth * size : SEVERAL_OUTPUTS * bytes - k * size;
            if (p->width <= depth && bytes == p->width * size) ahead = 0; /* one stream, which the CPU foresees */
            for (int64_t i = 0; i < count; i++) {
                const char *weight = p->weight + (n + i) * bytes + k * size;
                add_several(weight, values, width, weight + ahead, wide, sums[i], type);
            }
        }
        const int64_t row = block * x->rows, rows = p->num_rows - row < x->rows ? p->num_rows - row : x->rows;
        put_several(p, row, rows, n, count, sums, type);
    }
}

/* The same for the number of rows of a block. */
INLINE void several_outputs_of(const struct product *p, const struct interleaved *x, int64_t n, enum type type) {
    switch (x->wide) {
        case 4: several_outputs(p, x, n, 4, type); break;
        case 6: several_outputs(p, x, n, 6, type); break;
        case 8: several_outputs(p, x, n, 8, type); break;
#if SEVERAL_ROWS > 8
        case 10: several_outputs(p, x, n, 10, type); break;
        case 12: several_outputs(p, x, n, 12, type); break;
        case 14: several_outputs(p, x, n, 14, type); break;
        case 16: several_outputs(p, x, n, 16, type); break;
#endif
    }
}

/* `interleave_row` and `several_outputs_of` for constant types: the compiler does not pass constants into parallel
 * regions. */
struct several_kernel {
    void (*interleave)(const struct product *p, const struct interleaved *x, int64_t row);
    void (*run)(const struct product *p, const struct interleaved *x, int64_t n);
};

/* Returns 0 if out of memory. */
static int multiply_several(const struct product *p, const struct several_kernel *kernel) {
    struct interleaved x = interleaved_of(p);
    const size_t size = x.blocks * block_size_of(&x) * sizeof *x.values;
    x.values = aligned_alloc(LINE, (size + LINE - 1) / LINE * LINE);
    if (!x.values) return 0;
    if (x.wide * x.blocks > p->num_rows) memset(x.values, 0, size);
#pragma omp parallel if (is_large(p))
    {
#pragma omp for schedule(static)
        for (int64_t row = 0; row < p->num_rows; row++) kernel->interleave(p, &x, row);
#pragma omp for schedule(static)
        for (int64_t n = 0; n < p->num_outputs; n += SEVERAL_OUTPUTS) kernel->run(p, &x, n);
    }
    free(x.values);
    return 1;
}
