/* Products of several rows: weights are converted once per block of rows, and multiplied in tiles of a few outputs with
 * all rows of the block, whose sums fill the registers.
 *
 * Lanes are consecutive inputs, as in few_rows.h, and sums have the same order. Inputs are converted to float32 first and
 * interleaved, so that a weight's vector meets those of all rows at one place, in the L1 cache.
 */
#pragma once
#include <stdlib.h>

#include "few_rows.h"
#include "tasks.h"

#define SEVERAL_SUMS (REGISTERS == 32 ? 24 : 12) /* of a tile; the other registers hold its weights and an input */
#define SEVERAL_ROWS (REGISTERS == 32 ? 8 : 6)     /* of a block, at most */
#define FROM_SEVERAL (REGISTERS == 32 ? MOST_ROWS + 1 : 2) /* rows on, this is faster than few_rows.h */
#define LEAST_WIDE (REGISTERS == 32 ? 4 : 2)
#define SEVERAL_AHEAD 1024 /* bytes that the CPU does not prefetch early enough by itself */

/* Inputs in float32: [block][vectors of a row][rows of the block][LANES]; what is not there is zero. */
struct interleaved {
    float *values;
    int64_t rows, blocks, vectors;
    int64_t wide; /* rows of a block, with those that are zero */
};

/* Rows that sums are kept of, for `rows` rows. */
INLINE int64_t wide_of(int64_t rows) { return rows < LEAST_WIDE ? LEAST_WIDE : rows; }

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

/* held[i][r] += a vector of `count` elements of weight row i times that of input r. */
INLINE void add_vectors(floats held[SEVERAL_SUMS], const char *weight, int64_t bytes, int count, const float *x,
                        const int outputs, const int wide, enum type type) {
    floats first[SEVERAL_SUMS]; /* vectors of the operand that has fewer */
    if (outputs < wide) {
        UNROLL for (int i = 0; i < outputs; i++) first[i] = in_register(take_some(weight + i * bytes, count, type));
        UNROLL for (int r = 0; r < wide; r++) {
            const floats value = in_register(take(x + r * LANES, FLOAT32));
            UNROLL for (int i = 0; i < outputs; i++)
                held[i * wide + r] = multiply_add(held[i * wide + r], first[i], value, FLOAT32);
        }
    } else {
        UNROLL for (int r = 0; r < wide; r++) first[r] = in_register(take(x + r * LANES, FLOAT32));
        UNROLL for (int i = 0; i < outputs; i++) {
            const floats value = in_register(take_some(weight + i * bytes, count, type));
            UNROLL for (int r = 0; r < wide; r++)
                held[i * wide + r] = multiply_add(held[i * wide + r], value, first[r], FLOAT32);
        }
    }
}

/* sums[outputs][wide] = weight rows, `bytes` apart, times the inputs of a block. `ahead`: bytes to what is prefetched; 0 for
 * nothing. */
INLINE void several_tile(const char *weight, int64_t bytes, const float *x, int64_t width, int64_t ahead,
                         const int outputs, const int wide, floats *sums, enum type type) {
    const int64_t size = size_of(type), line = LINE / size;
    floats held[SEVERAL_SUMS];
    UNROLL for (int i = 0; i < outputs * wide; i++) held[i] = (floats){0};
    int64_t k = 0;
    for (; k + line <= width; k += line) {
        if (ahead)
            UNROLL for (int i = 0; i < outputs; i++) __builtin_prefetch(weight + i * bytes + ahead + k * size, 0, 2);
        for (int64_t i = k; i < k + line; i += LANES)
            add_vectors(held, weight + i * size, bytes, LANES, x + i * wide, outputs, wide, type);
    }
    for (; k < width; k += LANES) {
        const int count = width - k < LANES ? (int)(width - k) : LANES;
        add_vectors(held, weight + k * size, bytes, count, x + k * wide, outputs, wide, type);
    }
    UNROLL for (int i = 0; i < outputs * wide; i++) sums[i] = held[i];
}

/* Store the sums, [LANES][SEVERAL_SUMS], of `count` outputs from `n` on with the rows of a block, from `row` on. */
INLINE void put_several(const struct product *p, int64_t row, int64_t rows, int64_t n, int count,
                        const floats *sums, enum type type) {
    const size_t size = size_of(type);
    floats bias = {0};
    if (p->bias) bias = take_some(p->bias + n * size, count, type);
    for (int64_t r = 0; r < rows; r++) {
        float lanes[LANES];
        UNROLL for (int i = 0; i < LANES; i += 4) {
            const floats *of = sums + i * SEVERAL_SUMS + r;
            sum_four(lanes + i, of[0], of[SEVERAL_SUMS], of[2 * SEVERAL_SUMS], of[3 * SEVERAL_SUMS]);
        }
        give_some(p->outputs + ((row + r) * p->outputs_stride + n) * size, take(lanes, FLOAT32) + bias, count, type);
    }
}

/* A task: all rows with LANES outputs of each stream. The first stream's begin at `n`, the next ones' `apart` further on. */
INLINE void several_outputs(const struct product *p, const struct interleaved *x, int64_t n, int64_t apart,
                            const int wide, enum type type) {
    const int outputs = SEVERAL_SUMS / wide;
    const int64_t bytes = p->weight_stride * size_of(type);
    const int is_whole = n + (outputs - 1) * apart + LANES <= p->num_outputs;
    for (int64_t block = 0; block < x->blocks; block++) {
        const float *values = x->values + block * block_size_of(x);
        const int64_t ahead = block ? 0 : is_slice(p) ? bytes : SEVERAL_AHEAD;
        floats sums[LANES][SEVERAL_SUMS];
        if (!is_whole) memset(sums, 0, sizeof sums); /* outputs that do not exist are summed, too */
        for (int i = 0; i < LANES; i++) {
            const char *weight = p->weight + (n + i) * bytes;
            if (is_whole) {
                several_tile(weight, apart * bytes, values, p->width, ahead, outputs, wide, sums[i], type);
                continue;
            }
            for (int j = 0; j < outputs && n + i + j * apart < p->num_outputs; j++)
                several_tile(weight + j * apart * bytes, 0, values, p->width, ahead, 1, wide, sums[i] + j * wide, type);
        }
        const int64_t row = block * x->rows, rows = p->num_rows - row < x->rows ? p->num_rows - row : x->rows;
        for (int64_t j = 0, m = n; j < outputs && m < p->num_outputs; j++, m += apart) {
            const int count = p->num_outputs - m < LANES ? (int)(p->num_outputs - m) : LANES;
            put_several(p, row, rows, m, count, sums[0] + j * wide, type);
        }
    }
}

/* The same for the number of rows of a block. */
INLINE void several_outputs_of(const struct product *p, const struct interleaved *x, int64_t n, int64_t apart,
                               enum type type) {
    switch (x->wide) {
#if REGISTERS == 16
        case 2: several_outputs(p, x, n, apart, 2, type); break;
        case 3: several_outputs(p, x, n, apart, 3, type); break;
#endif
        case 4: several_outputs(p, x, n, apart, 4, type); break;
        case 5: several_outputs(p, x, n, apart, 5, type); break;
        case 6: several_outputs(p, x, n, apart, 6, type); break;
#if REGISTERS == 32
        case 7: several_outputs(p, x, n, apart, 7, type); break;
        case 8: several_outputs(p, x, n, apart, 8, type); break;
#endif
    }
}

/* `interleave_row` and `several_outputs_of` for constant types: the compiler does not pass constants into parallel
 * regions. */
struct several_kernel {
    void (*interleave)(const struct product *p, const struct interleaved *x, int64_t row);
    void (*run)(const struct product *p, const struct interleaved *x, int64_t n, int64_t apart);
};

/* Returns 0 if out of memory. The tiles' outputs are rows of as many streams, for the same reason as in few_rows.h. */
static int multiply_several(const struct product *p, const struct several_kernel *kernel) {
    struct interleaved x = interleaved_of(p);
    const int64_t streams = SEVERAL_SUMS / x.wide, vectors = streams * LANES;
    const int64_t apart = (p->num_outputs + vectors - 1) / vectors * LANES;
    const size_t size = x.blocks * block_size_of(&x) * sizeof *x.values;
    x.values = aligned_alloc(LINE, (size + LINE - 1) / LINE * LINE);
    if (!x.values) return 0;
    if (x.wide * x.blocks > p->num_rows) memset(x.values, 0, size);
    const struct tasks tasks = tasks_of(apart / LANES, threads_for(is_large(p)));
#pragma omp parallel if (tasks.threads > 1)
    {
#pragma omp for schedule(static)
        for (int64_t row = 0; row < p->num_rows; row++) kernel->interleave(p, &x, row);
        for (int64_t i; (i = take_task(&tasks)) >= 0;) kernel->run(p, &x, i * LANES, apart);
    }
    free(x.values);
    return 1;
}
