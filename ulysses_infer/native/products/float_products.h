/* Products of inputs as they are with weights expanded to float32, a segment of a few outputs at a time. */
#pragma once
#include "integer_rows.h"

#define PANEL_OF_FLOATS 4
#define FLOAT_ROWS 4 /* whose sums are in registers together */
#define MOST_SEGMENT 128

/* The segment's products of `rows` rows are added to sums[PANEL_OF_FLOATS][rows of all]. */
INLINE void add_segment(const float *weights, int64_t count, const float *x, int64_t stride, const int rows,
                        floats *sums, int64_t sums_stride) {
    floats held[PANEL_OF_FLOATS][FLOAT_ROWS];
    UNROLL for (int a = 0; a < PANEL_OF_FLOATS; a++)
        UNROLL for (int b = 0; b < rows; b++) held[a][b] = sums[a * sums_stride + b];
    for (int64_t k = 0; k < count; k += LANES)
        UNROLL for (int a = 0; a < PANEL_OF_FLOATS; a++) {
            const floats w = take(weights + a * MOST_SEGMENT + k, FLOAT32);
            UNROLL for (int b = 0; b < rows; b++) held[a][b] += w * take(x + b * stride + k, FLOAT32);
        }
    UNROLL for (int a = 0; a < PANEL_OF_FLOATS; a++)
        UNROLL for (int b = 0; b < rows; b++) sums[a * sums_stride + b] = held[a][b];
}

/* Outputs n .. n + count with all rows. x: [rows][stride]; sums: [PANEL_OF_FLOATS][rows]. */
static void float_panel(const struct product *p, int64_t n, int64_t count, const float *x, int64_t stride,
                        int8_t *bytes, floats *sums) {
    const int64_t rows = p->num_rows;
    float weights[PANEL_OF_FLOATS * MOST_SEGMENT];
    memset(weights, 0, sizeof weights);
    memset(sums, 0, PANEL_OF_FLOATS * rows * sizeof *sums);
    for (int64_t s = 0; s < p->num_segments; s++) {
        const int64_t start = p->segments[s].start, length = p->segments[s].stop - start;
        widen_segment(p->weight, n, count, &p->segments[s], bytes, weights, MOST_SEGMENT);
        for (int64_t i = 0; i < count && length % LANES; i++)
            memset(weights + i * MOST_SEGMENT + length, 0, (LANES - length % LANES) * sizeof *weights);
        for (int64_t t = 0; t < rows;) {
            const float *from = x + t * stride + start;
            switch (rows - t < FLOAT_ROWS ? rows - t : FLOAT_ROWS) {
                case 1: add_segment(weights, length, from, stride, 1, sums + t, rows), t += 1; break;
                case 2: add_segment(weights, length, from, stride, 2, sums + t, rows), t += 2; break;
                case 3: add_segment(weights, length, from, stride, 3, sums + t, rows), t += 3; break;
                default: add_segment(weights, length, from, stride, 4, sums + t, rows), t += 4;
            }
        }
    }
    for (int64_t i = 0; i < count; i++)
        for (int64_t t = 0; t < rows; t++) put(p, t, n + i, sum_of_lanes(sums[i * rows + t]));
}
