/* Products of a few rows: the weight is read once, in order, at memory speed.
 *
 * A panel of weight rows is multiplied with a block of input rows, with all sums in registers, while the next panel is
 * prefetched. Every sum runs over k in the same order for any number of input rows.
 */
#pragma once
#include "product.h"

#if defined(HAS_AVX512) || defined(__aarch64__)
#define MOST_ROWS 6 /* sums fill the 32 vector registers */
#else
#define MOST_ROWS 3
#endif
#define WIDE_PANEL 8
#define PANEL 4

/* Add the products of one vector of elements, from k on. */
INLINE void add_step(const struct product *p, const char *weight, const char *input, int64_t k, const int rows,
                     const int panel, floats sums[WIDE_PANEL][MOST_ROWS], enum type type) {
    const size_t size = size_of(type);
    floats x[MOST_ROWS];
    UNROLL for (int j = 0; j < rows; j++) x[j] = load(input + (j * p->inputs_stride + k) * size, type);
    UNROLL for (int i = 0; i < panel; i++) {
        const floats w = load(weight + (i * p->weight_stride + k) * size, type);
        UNROLL for (int j = 0; j < rows; j++) sums[i][j] = multiply_add(sums[i][j], w, x[j], type);
    }
}

/* Rows t .. t+rows of the inputs with rows n .. n+panel of the weight. Prefetches the rows `ahead` .. `end` of the
 * weight, if any. */
INLINE void tile(const struct product *p, int64_t t, int64_t n, const int rows, const int panel, int64_t ahead,
                 int64_t end, enum type type) {
    const size_t size = size_of(type);
    const int step = step_of(type), steps = LINE / (step * (int)size);
    const int64_t stride = p->weight_stride * size;
    const char *weight = p->weight + n * stride, *input = p->inputs + t * p->inputs_stride * size;
    const char *next = p->weight + ahead * stride;
    floats sums[WIDE_PANEL][MOST_ROWS];
    UNROLL for (int i = 0; i < panel; i++)
        UNROLL for (int j = 0; j < rows; j++) sums[i][j] = (floats){0};
    int64_t k = 0;
    for (; k + steps * step <= p->width; k += steps * step) {
        const char *line = next + k * size;
        for (int64_t i = ahead; i < end; i++, line += stride) __builtin_prefetch(line, 0, 2);
        UNROLL for (int s = 0; s < steps; s++)
            add_step(p, weight, input, k + s * step, rows, panel, sums, type);
    }
    for (; k + step <= p->width; k += step) add_step(p, weight, input, k, rows, panel, sums, type);
    if (k < p->width) {
        int rest = (int)(p->width - k);
        floats x[MOST_ROWS];
        UNROLL for (int j = 0; j < rows; j++) x[j] = load_part(input + (j * p->inputs_stride + k) * size, rest, type);
        UNROLL for (int i = 0; i < panel; i++) {
            floats w = load_part(weight + i * stride + k * size, rest, type);
            UNROLL for (int j = 0; j < rows; j++) sums[i][j] = multiply_add(sums[i][j], w, x[j], type);
        }
    }
    UNROLL for (int j = 0; j < rows; j++)
        UNROLL for (int i = 0; i < panel; i += PANEL) {
            float four[4];
            const floats none = {0};
            sum_four(four, sums[i][j], i + 1 < panel ? sums[i + 1][j] : none, i + 2 < panel ? sums[i + 2][j] : none,
                     i + 3 < panel ? sums[i + 3][j] : none);
            const int count = panel - i < PANEL ? panel - i : PANEL;
            for (int m = 0; m < count; m++)
                put_output(p, t + j, n + i + m, four[m] + bias_of(p, n + i + m, type), type);
        }
}

/* All input rows with one panel of the weight, in blocks of nearly equal size. */
INLINE void panel_of(const struct product *p, int64_t n, const int panel, int64_t end, enum type type) {
    int64_t blocks = (p->num_rows + MOST_ROWS - 1) / MOST_ROWS;
    int64_t left = end - n - panel, fetched = left < panel ? (left < 0 ? 0 : left) : panel;
    for (int64_t block = 0, t = 0; block < blocks; block++) {
        int64_t rows = (p->num_rows - t) / (blocks - block);
        int64_t ahead = n + panel + fetched * block / blocks, stop = n + panel + fetched * (block + 1) / blocks;
        switch (rows) {
            case 1: tile(p, t, n, 1, panel, ahead, stop, type); break;
            case 2: tile(p, t, n, 2, panel, ahead, stop, type); break;
            case 3: tile(p, t, n, 3, panel > PANEL && MOST_ROWS == 3 ? PANEL : panel, ahead, stop, type); break;
#if MOST_ROWS > 3
            case 4: tile(p, t, n, 4, panel > PANEL ? PANEL : panel, ahead, stop, type); break;
            case 5: tile(p, t, n, 5, panel > PANEL ? PANEL : panel, ahead, stop, type); break;
            case 6: tile(p, t, n, 6, panel > PANEL ? PANEL : panel, ahead, stop, type); break;
#endif
        }
        t += rows;
    }
}

/* All input rows with WIDE_PANEL rows of the weight, or fewer at the end. */
INLINE void few_rows_of(const struct product *p, int64_t group, enum type type) {
    const int64_t wide = p->num_rows * WIDE_PANEL <= MOST_ROWS * PANEL ? WIDE_PANEL : PANEL;
    int64_t n = group * WIDE_PANEL, stop = n + WIDE_PANEL < p->num_outputs ? n + WIDE_PANEL : p->num_outputs;
    if (wide == WIDE_PANEL && n + WIDE_PANEL <= stop) panel_of(p, n, WIDE_PANEL, p->num_outputs, type), n = stop;
    for (; n + PANEL <= stop; n += PANEL) panel_of(p, n, PANEL, p->num_outputs, type);
    for (; n < stop; n++) panel_of(p, n, 1, p->num_outputs, type);
}
