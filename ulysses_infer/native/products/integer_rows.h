/* Products of a few rows with bytes that have one scale per output: the lanes are consecutive inputs of one output.
 *
 * Nothing is transposed. The weight is read at STREAMS places by turns, a row of each: memory gives more to several
 * streams than to one, if no two share a page. With more rows of inputs, lanes that are outputs cost less.
 */
#pragma once
#include "integer_products.h"

#define STEP (4 * LANES) /* inputs of a vector */
#define BYTE_ROWS 4 /* of inputs, with which a row of the weight is multiplied while it is in the cache */
#define ROWS_AT_ONCE 2 /* of these, whose sums are in registers */
#define STREAMS 4
#define STREAM_AHEAD (LANES == 16 ? 1024 : 0) /* bytes that the CPU does not prefetch early enough by itself */

/* Outputs of one task: OUTPUTS from `first` on, as many `apart` from these, and so on. */
struct task {
    int64_t outputs, apart, first;
    int streams; /* that are not beyond the last output */
};

/* From one stream to the next. */
INLINE int64_t apart_of(int64_t outputs, int most) {
    return (outputs + most * OUTPUTS - 1) / (most * OUTPUTS) * OUTPUTS;
}

/* Task number `number`, of apart_of(outputs, most) / OUTPUTS, which have at most `most` streams. */
INLINE struct task task_of(int64_t outputs, int64_t number, int most) {
    const int64_t apart = apart_of(outputs, most), first = number * OUTPUTS;
    const int64_t streams = (outputs - first + apart - 1) / apart;
    return (struct task){outputs, apart, first, streams < most ? (int)streams : most};
}

/* How many outputs of a stream there are. */
INLINE int64_t count_of(const struct task *task, int stream) {
    const int64_t left = task->outputs - task->first - stream * task->apart;
    return left < OUTPUTS ? left : OUTPUTS;
}

/* Output `i` of a stream; those beyond the last are computed as the last. */
INLINE int64_t output_of(const struct task *task, int stream, int64_t i) {
    const int64_t output = task->first + stream * task->apart + i;
    return output < task->outputs ? output : task->outputs - 1;
}

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

/* Add a segment of a row of each stream, its inputs from `at` on, times rows of inputs; `codes` and `scales` are those
 * of the first. is_whole: `vectors` vectors can be read; else `left` bytes can. */
INLINE void add_byte_segment(const struct byte_rows *x, const char *const weights[STREAMS], int64_t at,
                             const int8_t *codes, const float *scales, int64_t vectors, const int is_whole,
                             int64_t left, const int rows, floats sums[STREAMS][ROWS_AT_ONCE]) {
    const int64_t segments = x->p->num_segments;
    integers whole[STREAMS][ROWS_AT_ONCE];
    UNROLL for (int i = 0; i < STREAMS; i++)
        UNROLL for (int r = 0; r < rows; r++) whole[i][r] = (integers){0};
    for (int64_t v = 0; v < vectors; v++)
        UNROLL for (int i = 0; i < STREAMS; i++) {
            const char *from = weights[i] + at + v * STEP;
            words read;
            if (is_whole)
                memcpy(&read, from, sizeof read);
            else
                read = load_bytes(from, left - v * STEP);
            read ^= WEIGHT_OFFSET ? 0x80808080 : 0;
            const words magnitude = magnitudes(read);
            UNROLL for (int r = 0; r < rows; r++) {
                words inputs;
                memcpy(&inputs, codes + r * segments * x->stride + v * STEP, sizeof inputs);
                whole[i][r] = byte_dot(whole[i][r], inputs, read, magnitude);
            }
        }
    UNROLL for (int r = 0; r < rows; r++) {
        const floats scale = splat(scales[r * segments]);
        UNROLL for (int i = 0; i < STREAMS; i++)
            sums[i][r] += __builtin_convertvector(whole[i][r], floats) * scale;
    }
}

/* A row of each stream, which begin at `weights`, with `rows` rows of inputs, the first of which is row `at` of those
 * from `t` on. per_segment: vectors of each segment, but perhaps the last, or 0 if one can end within a vector. */
INLINE void add_byte_rows(const struct byte_rows *x, const char *const weights[STREAMS], int64_t t, int at,
                          const int per_segment, const int rows, floats to[STREAMS][BYTE_ROWS]) {
    const struct product *p = x->p;
    const int8_t *codes = x->codes + (t + at) * p->num_segments * x->stride;
    const float *scales = x->scales + (t + at) * p->num_segments;
    floats sums[STREAMS][ROWS_AT_ONCE];
    /* In a slice, the CPU does not foresee where the next row of a stream begins. */
    const int64_t next = p->weight->code_output, ahead = next != p->weight->inputs ? next : STREAM_AHEAD;
    const struct segment *last = &p->segments[p->num_segments - 1];
    const int64_t equal = p->num_segments - (last->stop - last->start < per_segment * STEP);
    int64_t s = 0;
    UNROLL for (int i = 0; i < STREAMS; i++)
        UNROLL for (int r = 0; r < rows; r++) sums[i][r] = (floats){0};
    for (; per_segment && s < equal; s++, codes += x->stride, scales++) {
        const int64_t at = s * per_segment * STEP;
        for (int v = 0; ahead && v < per_segment * STEP; v += LINE)
            UNROLL for (int i = 0; i < STREAMS; i++) __builtin_prefetch(weights[i] + at + v + ahead, 0, 2);
        add_byte_segment(x, weights, at, codes, scales, per_segment, 1, 0, rows, sums);
    }
    for (; s < p->num_segments; s++, codes += x->stride, scales++) {
        const int64_t start = p->segments[s].start, count = p->segments[s].stop - start;
        const int64_t vectors = (count + STEP - 1) / STEP;
        add_byte_segment(x, weights, start, codes, scales, vectors, 0, p->weight->inputs - start, rows, sums);
    }
    UNROLL for (int i = 0; i < STREAMS; i++)
        UNROLL for (int r = 0; r < rows; r++) to[i][at + r] = sums[i][r];
}

/* Multiply the sums of one input row with OUTPUTS outputs by the scales of those, from `n` on. */
INLINE void scale_bytes(const struct stored *w, float input_sum, int64_t n, int64_t count, float *sums) {
    for (int64_t i = 0; i < count; i++) sums[i] = (sums[i] - WEIGHT_OFFSET * input_sum) * scale_of(w, n + i, 0);
}

/* Rows t .. t + rows with the outputs of a task. */
INLINE void byte_tile(const struct byte_rows *x, int64_t t, const struct task *task, const int per_segment,
                      const int rows) {
    const struct stored *w = x->p->weight;
    float sums[STREAMS][BYTE_ROWS * OUTPUTS];
    for (int64_t a = 0; a < OUTPUTS; a += 4) {
        floats four[4][STREAMS][BYTE_ROWS];
        for (int64_t i = 0; i < 4; i++) {
            const char *weights[STREAMS];
            for (int s = 0; s < STREAMS; s++) weights[s] = w->codes + output_of(task, s, a + i) * w->code_output;
            for (int at = 0; at + 2 <= rows; at += 2) add_byte_rows(x, weights, t, at, per_segment, 2, four[i]);
            if (rows % 2) add_byte_rows(x, weights, t, rows - 1, per_segment, 1, four[i]);
        }
        for (int s = 0; s < task->streams; s++)
            UNROLL for (int r = 0; r < rows; r++)
                sum_four(sums[s] + r * OUTPUTS + a, four[0][s][r], four[1][s][r], four[2][s][r], four[3][s][r]);
    }
    for (int s = 0; s < task->streams; s++) {
        const int64_t n = task->first + s * task->apart, count = count_of(task, s);
        UNROLL for (int r = 0; r < rows; r++) scale_bytes(w, x->sums[t + r], n, count, sums[s] + r * OUTPUTS);
        put_sums(x->p, t, rows, n, count, sums[s]);
    }
}

/* All rows with the outputs of a task. */
INLINE void byte_outputs_of(const struct byte_rows *x, const struct task *task, const int per_segment) {
    const int64_t all = x->p->num_rows;
    for (int64_t t = 0, rows; t < all; t += rows) {
        rows = all - t < BYTE_ROWS ? all - t : BYTE_ROWS;
        switch (rows) {
            case 1: byte_tile(x, t, task, per_segment, 1); break;
            case 2: byte_tile(x, t, task, per_segment, 2); break;
            case 3: byte_tile(x, t, task, per_segment, 3); break;
            case 4: byte_tile(x, t, task, per_segment, 4); break;
        }
    }
}

static void byte_outputs(const struct byte_rows *x, const struct task *task) {
    const struct stored *w = x->p->weight;
    const int is_even = w->first_input % w->segment == 0;
    if (is_even && w->segment == STEP)
        byte_outputs_of(x, task, 1);
    else if (is_even && w->segment == 2 * STEP)
        byte_outputs_of(x, task, 2);
    else if (is_even && w->segment == 4 * STEP)
        byte_outputs_of(x, task, 4);
    else
        byte_outputs_of(x, task, 0);
}
