/* Products with a weight that is stored by input: all outputs of one input are adjacent.
 *
 * A task is a run of outputs, whose sums for a few rows stay in the L1 cache while the inputs are visited in order. So
 * the weight is read once for a few rows, in long runs, and every sum runs over k in order.
 */
#pragma once
#include "product.h"

#define RUN 512        /* outputs of a task */
#define RUN_ROWS 4     /* rows whose sums are kept together */
#define RUN_INPUTS 4   /* inputs per visit of the sums */

/* sums[rows][RUN] += inputs k .. k + inputs of rows t .. t + rows, times the weight of `count` outputs from n on. */
INLINE void add_inputs(const struct product *p, int64_t t, int64_t n, int64_t count, int64_t k, const int rows,
                       const int inputs, float *sums, enum type type) {
    const size_t size = size_of(type);
    float x[RUN_ROWS][RUN_INPUTS];
    for (int j = 0; j < rows; j++)
        for (int i = 0; i < inputs; i++) x[j][i] = one_of(p->inputs, (t + j) * p->inputs_stride + k + i, type);
    const char *weight = p->weight + (k * p->weight_stride + n) * size;
    for (int64_t m = 0; m < count; m += LANES) {
        const int some = count - m < LANES ? (int)(count - m) : LANES;
        floats w[RUN_INPUTS];
        UNROLL for (int i = 0; i < inputs; i++) {
            const char *from = weight + (i * p->weight_stride + m) * size;
            w[i] = some == LANES ? take(from, type) : take_some(from, some, type);
        }
        UNROLL for (int j = 0; j < rows; j++) {
            floats sum;
            memcpy(&sum, sums + j * RUN + m, sizeof sum);
            UNROLL for (int i = 0; i < inputs; i++) sum += w[i] * x[j][i];
            memcpy(sums + j * RUN + m, &sum, sizeof sum);
        }
    }
}

INLINE void run_of(const struct product *p, int64_t t, int64_t n, int64_t count, const int rows, enum type type) {
    float sums[RUN_ROWS * RUN] __attribute__((aligned(LINE)));
    memset(sums, 0, rows * RUN * sizeof *sums);
    int64_t k = 0;
    for (; k + RUN_INPUTS <= p->width; k += RUN_INPUTS) add_inputs(p, t, n, count, k, rows, RUN_INPUTS, sums, type);
    for (; k < p->width; k++) add_inputs(p, t, n, count, k, rows, 1, sums, type);
    for (int j = 0; j < rows; j++)
        for (int64_t m = 0; m < count; m++)
            put_output(p, t + j, n + m, sums[j * RUN + m] + bias_of(p, n + m, type), type);
}

/* All rows with RUN outputs, or fewer at the end. */
INLINE void columns_of(const struct product *p, int64_t group, enum type type) {
    const int64_t n = group * RUN, count = p->num_outputs - n < RUN ? p->num_outputs - n : RUN;
    for (int64_t t = 0; t < p->num_rows;) {
        switch (p->num_rows - t < RUN_ROWS ? p->num_rows - t : RUN_ROWS) {
            case 1: run_of(p, t, n, count, 1, type), t += 1; break;
            case 2: run_of(p, t, n, count, 2, type), t += 2; break;
            case 3: run_of(p, t, n, count, 3, type), t += 3; break;
            default: run_of(p, t, n, count, RUN_ROWS, type), t += RUN_ROWS;
        }
    }
}

/* Write elements k .. k + count of the weights of output n as float32. */
INLINE void gather_as(const struct product *p, int64_t n, int64_t k, int64_t count, float *to, enum type type) {
    for (int64_t i = 0; i < count; i++) to[i] = one_of(p->weight, (k + i) * p->weight_stride + n, type);
}
