/* Products of a few rows with bytes that have one scale per output: the lanes are consecutive inputs of one output.
 *
 * Nothing is transposed, and lanes are summed once per output. With more rows, lanes that are outputs cost less.
 */
#pragma once
#include "integer_products.h"

#define STEP (DOTS_OF_BYTES ? 4 * LANES : 2 * LANES) /* inputs of an operand */
#define ROWS_OUTPUTS 4
#define ROWS_TOGETHER (REGISTERS == 32 ? 4 : 2)

#if DOTS_OF_BYTES
typedef int8_t code;
#else
typedef int16_t code;
#endif

/* Whether these products can multiply the weight. */
static inline int has_rows(const struct stored *w) {
    return w->values == INT8 && w->code_input == 1 && !w->group_size && w->scale_outputs == 1;
}

/* Quantised inputs: each segment is followed by zeros up to a whole operand. */
struct quantised_rows {
    code *codes;   /* [rows][segments][stride] */
    float *scales; /* [rows][segments] */
    float *sums;   /* [rows], of the inputs themselves */
    int64_t stride;
};

static void quantise_rows(const struct product *p, const struct quantised_rows *x, int8_t *narrow) {
    for (int64_t t = 0; t < p->num_rows; t++) {
        x->sums[t] = 0;
        for (int64_t s = 0; s < p->num_segments; s++) {
            const int64_t start = p->segments[s].start, count = p->segments[s].stop - start;
            const int64_t place = t * p->num_segments + s;
            int32_t sum;
            x->scales[place] =
                quantise(p->inputs + (t * p->inputs_stride + start) * size_of(p->type), count, p->type, narrow, &sum);
            x->sums[t] += x->scales[place] * (float)sum;
            code *to = x->codes + place * x->stride;
            for (int64_t k = 0; k < count; k++) to[k] = narrow[k];
            memset(to + count, 0, (x->stride - count) * sizeof *to);
        }
    }
}

/* The operand at `from`, of which `left` inputs are in the row. */
INLINE words row_operand(const char *from, int64_t left) {
#if DOTS_OF_BYTES
    words found[2];
    unpack(left >= STEP ? (words)take(from, FLOAT32) : load_bytes(from, left), BYTES, found);
    return found[0];
#else
    typedef int8_t narrow __attribute__((vector_size(2 * LANES)));
    char whole[2 * LANES] = {0};
    narrow read;
    if (left < STEP) memcpy(whole, from, left);
    memcpy(&read, left < STEP ? whole : from, sizeof read);
    return (words)__builtin_convertvector(read, shorts);
#endif
}

/* Outputs n .. n + count of the rows t .. t + rows. */
INLINE void multiply_outputs(const struct product *p, const struct quantised_rows *x, int64_t t, int64_t n, const int count,
                     const int rows) {
    const struct stored *w = p->weight;
    const char *weight = w->codes + n * w->code_output;
    floats sums[ROWS_OUTPUTS][ROWS_TOGETHER];
    UNROLL for (int a = 0; a < ROWS_OUTPUTS; a++)
        UNROLL for (int r = 0; r < ROWS_TOGETHER; r++) sums[a][r] = (floats){0};
    for (int64_t s = 0; s < p->num_segments; s++) {
        integers whole[ROWS_OUTPUTS][ROWS_TOGETHER];
        UNROLL for (int a = 0; a < count; a++)
            UNROLL for (int r = 0; r < rows; r++) whole[a][r] = (integers){0};
        const code *codes = x->codes + (t * p->num_segments + s) * x->stride;
        for (int64_t k = p->segments[s].start; k < p->segments[s].stop; k += STEP, codes += STEP)
            UNROLL for (int a = 0; a < count; a++) {
                const char *from = weight + a * w->code_output + k;
                const words operand = row_operand(from, w->inputs - k);
                __builtin_prefetch(from + 2 * ROWS_OUTPUTS * w->code_output, 0, 2);
                UNROLL for (int r = 0; r < rows; r++) {
                    const code *input = codes + r * p->num_segments * x->stride;
                    whole[a][r] = dot(whole[a][r], (words)take(input, FLOAT32), operand);
                }
            }
        UNROLL for (int r = 0; r < rows; r++) {
            const float scale = x->scales[(t + r) * p->num_segments + s];
            UNROLL for (int a = 0; a < count; a++)
                sums[a][r] += __builtin_convertvector(whole[a][r], floats) * scale;
        }
    }
    UNROLL for (int r = 0; r < rows; r++) {
        float all[ROWS_OUTPUTS];
        sum_four(all, sums[0][r], sums[1][r], sums[2][r], sums[3][r]);
        UNROLL for (int a = 0; a < count; a++) {
            const float scale = scale_of(w, n + a, 0);
            put(p, t + r, n + a, (all[a] - WEIGHT_OFFSET * x->sums[t + r]) * scale);
        }
    }
}

/* All rows with `count` outputs. */
INLINE void rows_of_outputs(const struct product *p, const struct quantised_rows *x, int64_t n, const int count) {
    for (int64_t t = 0; t < p->num_rows;) {
        const int64_t rows = p->num_rows - t < ROWS_TOGETHER ? p->num_rows - t : ROWS_TOGETHER;
        switch (rows) {
            case 1: multiply_outputs(p, x, t, n, count, 1); break;
            case 2: multiply_outputs(p, x, t, n, count, 2); break;
#if REGISTERS == 32
            case 3: multiply_outputs(p, x, t, n, count, 3); break;
            case 4: multiply_outputs(p, x, t, n, count, 4); break;
#endif
        }
        t += rows;
    }
}
