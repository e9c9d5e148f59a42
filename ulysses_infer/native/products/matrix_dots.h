/* Products of bytes of two rows with two outputs in one instruction (Arm's i8mm): twice the work of a dot product. */
#pragma once
#include "integer_panels.h"

#if defined(__ARM_FEATURE_MATMUL_INT8)
#define HAS_MATRIX_DOTS 1
#else
#define HAS_MATRIX_DOTS 0
#endif

#if HAS_MATRIX_DOTS
/* Two operands for each vector of outputs: of a word of nibbles, or of two words of bytes. */
INLINE void load_two(const uint32_t *w, enum kind kind, words to[2][VECTORS]) {
    load_operands(w, kind, to);
    if (kind == BYTES)
        UNROLL for (int v = 0; v < VECTORS; v++) to[1][v] = (words)take(w + OUTPUTS + v * LANES, FLOAT32);
}

/* sums[pairs of rows][pairs of outputs] += the products of two operands. x: [2][rows]. */
INLINE void add_matrices(const words weights[2][VECTORS], const uint32_t *x, const int rows,
                         int32x4_t sums[TILE_ROWS / 2][2 * VECTORS]) {
    int8x16_t pairs[2 * VECTORS];
    UNROLL for (int v = 0; v < VECTORS; v++) {
        const uint32x4_t first = (uint32x4_t)weights[0][v], second = (uint32x4_t)weights[1][v];
        pairs[2 * v] = vreinterpretq_s8_u32(vzip1q_u32(first, second));
        pairs[2 * v + 1] = vreinterpretq_s8_u32(vzip2q_u32(first, second));
    }
    UNROLL for (int r = 0; r + 1 < rows; r += 2) {
        const uint32x2_t first = vld1_u32(x + r), second = vld1_u32(x + rows + r);
        const uint32x4_t inputs = vcombine_u32(vzip1_u32(first, second), vzip2_u32(first, second));
        UNROLL for (int o = 0; o < 2 * VECTORS; o++)
            sums[r / 2][o] = vmmlaq_s32(sums[r / 2][o], vreinterpretq_s8_u32(inputs), pairs[o]);
    }
}

/* Add to whole[rows][VECTORS] the products of the first words of a panel, all or all but one of `count`; returns how
 * many. The last of an odd number of rows has dot products. */
INLINE int64_t add_matrix_words(const uint32_t *w, const uint32_t *x, int64_t count, const int rows,
                                const enum kind kind, integers whole[TILE_ROWS][VECTORS]) {
    const int step = kind == NIBBLES ? 1 : 2; /* words of two operands */
    int32x4_t sums[TILE_ROWS / 2][2 * VECTORS];
    int64_t k = 0;
    UNROLL for (int i = 0; i < rows / 2; i++)
        UNROLL for (int o = 0; o < 2 * VECTORS; o++) sums[i][o] = vdupq_n_s32(0);
    for (; k + step <= count; k += step, w += step * OUTPUTS, x += 2 * rows) {
        words weights[2][VECTORS];
        load_two(w, kind, weights);
        add_matrices(weights, x, rows, sums);
        UNROLL for (int o = 0; o < 2 * (rows % 2); o++)
            UNROLL for (int v = 0; v < VECTORS; v++)
                whole[rows - 1][v] = dot(whole[rows - 1][v], (words){0} + x[o * rows + rows - 1], weights[o][v]);
    }
    UNROLL for (int r = 0; r + 1 < rows; r += 2)
        UNROLL for (int v = 0; v < VECTORS; v++) {
            const int64x2_t first = vreinterpretq_s64_s32(sums[r / 2][2 * v]);
            const int64x2_t second = vreinterpretq_s64_s32(sums[r / 2][2 * v + 1]);
            whole[r][v] += (integers)vtrn1q_s64(first, second), whole[r + 1][v] += (integers)vtrn2q_s64(first, second);
        }
    return k;
}
#endif
