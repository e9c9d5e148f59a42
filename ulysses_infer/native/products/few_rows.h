/* Products of a few rows: the weight is read once, in order, at memory speed.
 *
 * A panel of weight rows is multiplied with a block of input rows, with all sums in registers. The rows of a panel are far
 * apart: memory gives more to several streams than to one, if no two share a page. Every sum runs over k in the same order
 * for any number of input rows.
 */
#pragma once
#include "product.h"

#define MOST_ROWS (REGISTERS == 32 ? 6 : 3) /* sums fill the vector registers */
#if defined(HAS_AVX512)
#define FEW_AHEAD 2048 /* bytes that the CPU does not prefetch early enough by itself */
#elif defined(__aarch64__)
#define FEW_AHEAD 0
#else
#define FEW_AHEAD 512
#endif
#define WIDE_PANEL 8
#define PANEL 4

/* Add the products of one vector of elements, from k on; `stride` bytes are from one row of the panel to the next. */
INLINE void add_step(const struct product *p, const char *weight, int64_t stride, const char *input, int64_t k,
                     const int rows, const int panel, floats sums[WIDE_PANEL][MOST_ROWS], enum type type) {
    const size_t size = size_of(type);
    floats x[MOST_ROWS];
    UNROLL for (int j = 0; j < rows; j++) x[j] = load(input + (j * p->inputs_stride + k) * size, type);
    UNROLL for (int i = 0; i < panel; i++) {
        const floats w = load(weight + i * stride + k * size, type);
        UNROLL for (int j = 0; j < rows; j++) sums[i][j] = multiply_add(sums[i][j], w, x[j], type);
    }
}

/* Whether rows of the weight are parts of longer ones: the CPU does not foresee where the next ones begin. */
INLINE int is_slice(const struct product *p) { return p->weight_stride != p->width; }

/* Rows t .. t + rows of the inputs with `panel` rows of the weight, n and those `apart`. */
INLINE void tile(const struct product *p, int64_t t, int64_t n, int64_t apart, const int rows, const int panel,
                 enum type type) {
    const size_t size = size_of(type);
    const int step = step_of(type);
    const int64_t stride = apart * p->weight_stride * size;
    const char *weight = p->weight + n * p->weight_stride * size, *input = p->inputs + t * p->inputs_stride * size;
    floats sums[WIDE_PANEL][MOST_ROWS];
    UNROLL for (int i = 0; i < panel; i++)
        UNROLL for (int j = 0; j < rows; j++) sums[i][j] = (floats){0};
    int64_t k = 0;
    const int64_t ahead = is_slice(p) ? panel * stride : FEW_AHEAD;
    if (ahead) {
        const int line = LINE / (int)size;
        for (; k + line <= p->width; k += line) {
            UNROLL for (int i = 0; i < panel; i++) __builtin_prefetch(weight + i * stride + ahead + k * size, 0, 2);
            UNROLL for (int s = 0; s < line; s += step)
                add_step(p, weight, stride, input, k + s, rows, panel, sums, type);
        }
    }
    for (; k + step <= p->width; k += step) add_step(p, weight, stride, input, k, rows, panel, sums, type);
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
                put_output(p, t + j, n + (i + m) * apart, four[m] + bias_of(p, n + (i + m) * apart, type), type);
        }
}

/* All input rows with one panel of the weight, in blocks of nearly equal size. */
INLINE void panel_of(const struct product *p, int64_t n, int64_t apart, const int panel, enum type type) {
    const int64_t blocks = (p->num_rows + MOST_ROWS - 1) / MOST_ROWS;
    for (int64_t block = 0, t = 0; block < blocks; block++) {
        const int64_t rows = (p->num_rows - t) / (blocks - block);
        switch (rows) {
            case 1: tile(p, t, n, apart, 1, panel, type); break;
            case 2: tile(p, t, n, apart, 2, panel, type); break;
            case 3: tile(p, t, n, apart, 3, panel > PANEL && MOST_ROWS == 3 ? PANEL : panel, type); break;
#if MOST_ROWS > 3
            case 4: tile(p, t, n, apart, 4, panel > PANEL ? PANEL : panel, type); break;
            case 5: tile(p, t, n, apart, 5, panel > PANEL ? PANEL : panel, type); break;
            case 6: tile(p, t, n, apart, 6, panel > PANEL ? PANEL : panel, type); break;
#endif
        }
        t += rows;
    }
}

/* How many groups the outputs are, and, in whole rows, from one output of a group to the next. */
INLINE int64_t groups_of(const struct product *p) { return (p->num_outputs + WIDE_PANEL - 1) / WIDE_PANEL; }

/* All input rows with the outputs of a group, WIDE_PANEL or fewer: neighbours in a slice, whose next panel is prefetched,
 * else far apart. */
INLINE void few_rows_of(const struct product *p, int64_t group, enum type type) {
    const int64_t apart = is_slice(p) ? 1 : groups_of(p), first = is_slice(p) ? group * WIDE_PANEL : group;
    const int64_t left = (p->num_outputs - first + apart - 1) / apart, count = left < WIDE_PANEL ? left : WIDE_PANEL;
    int64_t i = 0;
    if (count == WIDE_PANEL && p->num_rows * WIDE_PANEL <= MOST_ROWS * PANEL) {
        panel_of(p, first, apart, WIDE_PANEL, type);
        return;
    }
    for (; i + PANEL <= count; i += PANEL) panel_of(p, first + i * apart, apart, PANEL, type);
    for (; i < count; i++) panel_of(p, first + i * apart, apart, 1, type);
}
