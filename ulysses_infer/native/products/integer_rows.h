/* Products of a few rows with bytes that have one scale per output: the lanes are consecutive inputs of one output.
 *
 * Nothing is transposed, and rows of the weight are read one after another. With more rows, lanes that are outputs cost
 * less.
 */
#pragma once
#include "integer_products.h"

#define STEP (4 * LANES) /* inputs of a vector */
#define BYTE_ROWS 4 /* of inputs, whose sums are in registers together */
#define AHEAD_BYTES 16384 /* of the weight, which are fetched before they are needed */

/* Whether these products can multiply the weight. */
static inline int has_byte_rows(const struct stored *w) {
    return w->values == INT8 && w->code_input == 1 && !w->group_size && w->scale_outputs == 1;
}

/* Quantised inputs: each segment is followed by zeros up to a whole vector. */
struct byte_rows {
    const struct product *p;
    int8_t *codes;  /* [rows][segments][stride] */
    float *scales;  /* [rows][segments] */
    float *sums;    /* [rows], of the inputs themselves */
    int64_t stride;
};

static int64_t byte_stride(const struct product *p) { return (p->weight->segment + STEP - 1) / STEP * STEP; }

/* `codes` and what follows them are taken from `memory`, `byte_rows_size` of it. */
static int64_t byte_rows_size(const struct product *p) {
    return p->num_rows * (p->num_segments * (byte_stride(p) + (int64_t)sizeof(float)) + (int64_t)sizeof(float));
}

static struct byte_rows byte_rows_of(const struct product *p, char *memory) {
    struct byte_rows x = {.p = p, .codes = (int8_t *)memory, .stride = byte_stride(p)};
    x.scales = (float *)(memory + p->num_rows * p->num_segments * x.stride);
    x.sums = x.scales + p->num_rows * p->num_segments;
    return x;
}

/* Quantise the inputs of all rows. narrow: room for a segment. */
static void quantise_for_bytes(const struct byte_rows *x, int8_t *narrow) {
    const struct product *p = x->p;
    for (int64_t t = 0; t < p->num_rows; t++) {
        x->sums[t] = 0;
        for (int64_t s = 0; s < p->num_segments; s++) {
            const int64_t start = p->segments[s].start, count = p->segments[s].stop - start;
            const int64_t place = t * p->num_segments + s;
            int32_t sum;
            x->scales[place] =
                quantise(p->inputs + (t * p->inputs_stride + start) * size_of(p->type), count, p->type, narrow, &sum);
            x->sums[t] += x->scales[place] * (float)sum;
            memcpy(x->codes + place * x->stride, narrow, count);
            memset(x->codes + place * x->stride + count, 0, x->stride - count);
        }
    }
}

/* Add a segment of one output, `count` inputs from `weight` on, times rows of inputs; `codes` and `scales` are those of
 * the first row. is_whole: `vectors` vectors can be read; else `left` bytes can. */
INLINE void add_byte_segment(const struct byte_rows *x, const char *weight, const int8_t *codes, const float *scales,
                             int64_t vectors, const int is_whole, int64_t left, const int rows, floats *sums) {
    const int64_t segments = x->p->num_segments;
    integers whole[BYTE_ROWS];
    UNROLL for (int r = 0; r < rows; r++) whole[r] = (integers){0};
    for (int64_t v = 0; v < vectors; v++) {
        words read, magnitude;
        if (is_whole)
            memcpy(&read, weight + v * STEP, sizeof read);
        else
            read = load_bytes(weight + v * STEP, left - v * STEP);
        read ^= WEIGHT_OFFSET ? 0x80808080 : 0;
        magnitude = magnitudes(read);
        UNROLL for (int r = 0; r < rows; r++) {
            words inputs;
            memcpy(&inputs, codes + r * segments * x->stride + v * STEP, sizeof inputs);
            whole[r] = byte_dot(whole[r], inputs, read, magnitude);
        }
    }
    UNROLL for (int r = 0; r < rows; r++)
        sums[r] += __builtin_convertvector(whole[r], floats) * scales[r * segments];
}

/* One output, whose weights begin at `weight`, with rows t .. t + rows. per_segment: vectors of
 * each segment but the last, or 0 if one can end within a vector. */
INLINE void add_byte_row(const struct byte_rows *x, const char *weight, int64_t t, const int per_segment,
                         const int rows, floats sums[BYTE_ROWS]) {
    const struct product *p = x->p;
    const int8_t *codes = x->codes + t * p->num_segments * x->stride;
    const float *scales = x->scales + t * p->num_segments;
    int64_t s = 0;
    UNROLL for (int r = 0; r < rows; r++) sums[r] = (floats){0};
    for (; per_segment && s < p->num_segments - 1; s++, codes += x->stride, scales++) {
        const char *from = weight + s * per_segment * STEP;
        __builtin_prefetch(from + AHEAD_BYTES, 0, 2);
        add_byte_segment(x, from, codes, scales, per_segment, 1, 0, rows, sums);
    }
    for (; s < p->num_segments; s++, codes += x->stride, scales++) {
        const int64_t start = p->segments[s].start, count = p->segments[s].stop - start;
        const int64_t vectors = (count + STEP - 1) / STEP;
        add_byte_segment(x, weight + start, codes, scales, vectors, 0, p->weight->inputs - start, rows, sums);
    }
}

/* Outputs n .. n + count of rows t .. t + rows; count: at most OUTPUTS. */
INLINE void byte_tile(const struct byte_rows *x, int64_t t, int64_t n, int64_t count, const int per_segment,
                      const int rows) {
    const struct stored *w = x->p->weight;
    float sums[BYTE_ROWS * OUTPUTS];
    for (int64_t a = 0; a < count; a += 4) {
        floats four[4][BYTE_ROWS];
        for (int64_t i = a; i < a + 4; i++) { /* outputs beyond the last are computed as the last */
            floats held[BYTE_ROWS];
            add_byte_row(x, w->codes + (n + (i < count ? i : count - 1)) * w->code_output, t, per_segment, rows, held);
            UNROLL for (int r = 0; r < rows; r++) four[i - a][r] = held[r];
        }
        UNROLL for (int r = 0; r < rows; r++)
            sum_four(sums + r * OUTPUTS + a, four[0][r], four[1][r], four[2][r], four[3][r]);
    }
    for (int64_t i = 0; i < count; i++) {
        const float scale = scale_of(w, n + i, 0);
        UNROLL for (int r = 0; r < rows; r++) {
            float *sum = &sums[r * OUTPUTS + i];
            *sum = (*sum - WEIGHT_OFFSET * x->sums[t + r]) * scale;
        }
    }
    put_sums(x->p, t, rows, n, count, sums);
}

/* Outputs n .. n + count of all rows; count: at most OUTPUTS. */
INLINE void byte_outputs_of(const struct byte_rows *x, int64_t n, int64_t count, const int per_segment) {
    const int64_t all = x->p->num_rows;
    for (int64_t t = 0, rows; t < all; t += rows) {
        rows = all - t < BYTE_ROWS ? all - t : BYTE_ROWS;
        switch (rows) {
            case 1: byte_tile(x, t, n, count, per_segment, 1); break;
            case 2: byte_tile(x, t, n, count, per_segment, 2); break;
            case 3: byte_tile(x, t, n, count, per_segment, 3); break;
            case 4: byte_tile(x, t, n, count, per_segment, 4); break;
        }
    }
}

static void byte_outputs(const struct byte_rows *x, int64_t n, int64_t count) {
    const struct stored *w = x->p->weight;
    const int is_even = w->first_input % w->segment == 0;
    if (is_even && w->segment == STEP)
        byte_outputs_of(x, n, count, 1);
    else if (is_even && w->segment == 2 * STEP)
        byte_outputs_of(x, n, count, 2);
    else if (is_even && w->segment == 4 * STEP)
        byte_outputs_of(x, n, count, 4);
    else
        byte_outputs_of(x, n, count, 0);
}
