/* Products of inputs, quantised row by row and segment by segment, with weights as 8-bit integers.
 *
 * outputs[t, n] = sum over segments s of (scale of inputs t, s) * (scale of weight n, s) * (integer dot product of both).
 * A row's result does not depend on the other rows, except that many rows are summed in another order than few.
 */
#pragma once
#include "integer_dots.h"
#include "stored_weights.h"

#define FEW_ROWS 10 /* up to this many, sums across lanes cost less than lanes without a row */
#define OUTPUTS (2 * LANES) /* weight rows that are expanded together */
#if LANES == 16 || defined(__aarch64__)
#define ROWS_IN_REGISTERS 4
#define VECTORS 3 /* of input rows */
#define PANEL_OF_FEW 4
#define PANEL_OF_MANY 4
#else
#define ROWS_IN_REGISTERS 2
#define VECTORS 2
#define PANEL_OF_FEW 2
#define PANEL_OF_MANY 2
#endif
#define NEAR (512 << 10) /* bytes of quantised inputs that stay in the L2 cache beside the weight */

struct product {
    const struct stored *weight;
    const char *inputs, *bias; /* bias may be null */
    char *outputs;
    int64_t num_rows, inputs_stride, outputs_stride; /* elements from one row to the next */
    enum type type;
    const struct segment *segments;
    int64_t num_segments;
};

/* How few rows of inputs read a panel of the weight. */
enum form { BYTES_OF_CHANNELS, BYTES_OF_SEGMENTS, NIBBLES_OF_SEGMENTS };

/* Some outputs of the weight, expanded. */
struct panel {
    enum form form;
    const char *rows[OUTPUTS];
    float *scales; /* [OUTPUTS][segments] */
    int8_t *zeros; /* [OUTPUTS][segments], of nibbles */
    int8_t *bytes; /* [OUTPUTS][stride] */
    int16_t *wide; /* the same in 16 bits, if `dot` takes those, for many rows */
    int32_t *sums; /* [OUTPUTS][segments]: what OFFSET adds to the dot products of many rows */
    int64_t stride, ahead; /* ahead: from one row to the next of what is read from memory, to prefetch it */
};

INLINE int64_t padded(int64_t count) { return (count + VALUES - 1) / VALUES * VALUES + VALUES; }

INLINE void put(const struct product *p, int64_t t, int64_t n, float value) {
    const int64_t place = t * p->outputs_stride + n;
    if (p->type == FLOAT32)
        ((float *)p->outputs)[place] = value + (p->bias ? ((const float *)p->bias)[n] : 0);
    else
        ((bfloat16 *)p->outputs)[place] = bfloat16_of(value + (p->bias ? float_of(((const bfloat16 *)p->bias)[n]) : 0));
}

/* Outputs n .. n + count of the weight; `many`: as many rows of inputs read them. */
static void expand(const struct product *p, int64_t n, int64_t count, int many, struct panel *to) {
    const struct stored *w = p->weight;
    const int is_direct = w->values == INT8 && w->code_input == 1 && (!many || (QUAD == 4 && w->inputs % 4 == 0));
    const int is_nibbles = !many && w->values == PACKED && reading_of(w) == NIBBLES;
    const int in_place = is_direct || is_nibbles;
    to->form = is_nibbles ? NIBBLES_OF_SEGMENTS : is_direct && !w->group_size ? BYTES_OF_CHANNELS : BYTES_OF_SEGMENTS;
    to->ahead = in_place ? w->code_output : 0;
    for (int64_t i = 0; i < count; i++)
        to->rows[i] = in_place ? w->codes + (n + i) * w->code_output : (const char *)to->bytes + i * to->stride;
    expand_rows(w, n, count, p->segments, p->num_segments, !in_place, to->bytes, to->stride, to->scales, to->zeros);
    if (!many) return;
    if (!in_place)
        for (int64_t i = 0; i < count; i++) memset(to->bytes + i * to->stride + w->inputs, 0, QUAD);
#if QUAD == 2
    for (int64_t i = 0; i < count; i++) {
        const int8_t *row = (const int8_t *)to->rows[i];
        for (int64_t k = 0; k < w->inputs + w->inputs % 2; k++) to->wide[i * to->stride + k] = row[k];
    }
#elif OFFSET
    for (int64_t i = 0; i < count; i++)
        for (int64_t s = 0; s < p->num_segments; s++) {
            const int8_t *row = (const int8_t *)to->rows[i];
            integers sum = {0};
            int64_t k = p->segments[s].start;
            const int64_t stop = p->segments[s].stop;
            for (; k + VALUES <= stop; k += VALUES) sum = dot(sum, offsets(), load_weights(row + k));
            if (k < stop) sum = dot(sum, offsets(), load_some_weights(row + k, stop - k));
            int32_t all = 0;
            for (int lane = 0; lane < LANES; lane++) all += sum[lane];
            to->sums[i * p->num_segments + s] = all;
        }
#endif
}

/* -- few rows: a vector holds consecutive inputs of one row ---------------------------------------------------- */

struct quantised {
    code *codes;   /* [rows][stride] */
    float *scales; /* [rows][segments] */
    int64_t stride;
};

/* VALUES weights from input k on, or up to `stop`. */
INLINE integers weights_of(const struct panel *w, int64_t i, int64_t k, int64_t stop, int zero, const enum form form) {
    if (form == NIBBLES_OF_SEGMENTS) {
        const uint8_t *from = (const uint8_t *)w->rows[i] + k / 2;
        return k + VALUES <= stop ? load_nibbles(from, zero) : load_some_nibbles(from, stop - k, zero);
    }
    const int8_t *from = (const int8_t *)w->rows[i] + k;
    return k + VALUES <= stop ? load_weights(from) : load_some_weights(from, stop - k);
}

INLINE void few(const struct product *p, const struct panel *w, int64_t i, const int panel, const struct quantised *x,
                int64_t t, const int rows, int64_t n, const enum form form) {
    floats sums[PANEL_OF_FEW][ROWS_IN_REGISTERS];
    UNROLL for (int a = 0; a < panel; a++)
        UNROLL for (int b = 0; b < rows; b++) sums[a][b] = (floats){0};
    for (int64_t s = 0; s < p->num_segments; s++) {
        const int64_t start = p->segments[s].start, stop = p->segments[s].stop;
        UNROLL for (int a = 0; a < panel; a++) {
            const int64_t place = (i + a) * p->num_segments + s;
            const int zero = form == NIBBLES_OF_SEGMENTS ? w->zeros[place] : 0;
            integers whole[ROWS_IN_REGISTERS], offset = {0};
            UNROLL for (int b = 0; b < rows; b++) whole[b] = (integers){0};
            for (int64_t k = start; k < stop; k += VALUES) {
                const integers weights = weights_of(w, i + a, k, stop, zero, form);
                if (form != BYTES_OF_SEGMENTS)
                    __builtin_prefetch(w->rows[i + a] + panel * w->ahead + (form == NIBBLES_OF_SEGMENTS ? k / 2 : k), 0, 2);
                if (OFFSET) offset = dot(offset, offsets(), weights);
                UNROLL for (int b = 0; b < rows; b++)
                    whole[b] = dot(whole[b], load_codes(x->codes + (t + b) * x->stride + k), weights);
            }
            UNROLL for (int b = 0; b < rows; b++) {
                floats sum = __builtin_convertvector(whole[b] - offset, floats);
                if (form != BYTES_OF_CHANNELS) sum = sum * w->scales[place];
                sums[a][b] += sum * x->scales[(t + b) * p->num_segments + s];
            }
        }
    }
    UNROLL for (int a = 0; a < panel; a++) {
        const float scale = form == BYTES_OF_CHANNELS ? w->scales[(i + a) * p->num_segments] : 1;
        UNROLL for (int b = 0; b < rows; b++) put(p, t + b, n + i + a, sum_of_lanes(sums[a][b]) * scale);
    }
}

INLINE void few_rows(const struct product *p, const struct panel *w, int64_t i, const int panel,
                     const struct quantised *x, int64_t n, const enum form form) {
    for (int64_t t = 0; t < p->num_rows;) {
        switch (p->num_rows - t < ROWS_IN_REGISTERS ? p->num_rows - t : ROWS_IN_REGISTERS) {
            case 1: few(p, w, i, panel, x, t, 1, n, form), t += 1; break;
#if ROWS_IN_REGISTERS == 4
            case 3: few(p, w, i, panel, x, t, 3, n, form), t += 3; break;
            case 4: few(p, w, i, panel, x, t, 4, n, form), t += 4; break;
#endif
            default: few(p, w, i, panel, x, t, 2, n, form), t += 2;
        }
    }
}

INLINE void few_of_panel(const struct product *p, const struct panel *w, int64_t i, const int panel,
                         const struct quantised *x, int64_t n) {
    switch (w->form) {
        case BYTES_OF_CHANNELS: few_rows(p, w, i, panel, x, n, BYTES_OF_CHANNELS); break;
        case BYTES_OF_SEGMENTS: few_rows(p, w, i, panel, x, n, BYTES_OF_SEGMENTS); break;
        default: few_rows(p, w, i, panel, x, n, NIBBLES_OF_SEGMENTS);
    }
}

/* -- many rows: each lane holds one row ------------------------------------------------------------------------ */

/* Blocks of 1 to VECTORS vectors of rows: words of QUAD codes, [block][inputs / QUAD][vectors * LANES]. */
struct lanes {
    uint32_t *words;
    float *scales; /* [segments][vectors * LANES] of all rows */
    int64_t rows, vectors, blocks, width; /* width: in words */
};

INLINE int64_t first_vector(const struct lanes *x, int64_t block) { return x->vectors * block / x->blocks; }

/* Quantise and transpose one vector of rows; `space` is for LANES rows of codes. */
static void fill_lanes(const struct product *p, const struct lanes *x, int64_t block, int64_t v, code *space) {
    const int64_t first = first_vector(x, block), wide = (first_vector(x, block + 1) - first) * LANES;
    const int64_t row = (first + v) * LANES, stride = padded(p->weight->inputs), size = size_of(p->type);
    for (int64_t i = 0; i < LANES; i++) {
        code *to = space + i * stride;
        const int64_t t = row + i;
        for (int64_t s = 0; s < p->num_segments; s++) {
            const int64_t start = p->segments[s].start, count = p->segments[s].stop - start;
            const char *from = p->inputs + (t * p->inputs_stride + start) * size;
            x->scales[s * x->vectors * LANES + row + i] = t < x->rows ? quantise(from, count, p->type, to + start) : 0;
        }
        for (int64_t k = t < x->rows ? p->weight->inputs : 0; k < stride; k++) to[k] = OFFSET;
    }
    uint32_t *to = x->words + first * LANES * x->width + v * LANES;
    for (int64_t k = 0; k < x->width; k += LANES) {
        floats square[LANES];
        for (int i = 0; i < LANES; i++) memcpy(&square[i], space + i * stride + k * QUAD, sizeof square[i]);
        transpose_square(square);
        for (int i = 0; i < LANES && k + i < x->width; i++) memcpy(to + (k + i) * wide, &square[i], sizeof square[i]);
    }
}

/* Sums of `panel` outputs with `count` vectors of rows: sums[panel][VECTORS * LANES]. */
INLINE void many(const struct product *p, const struct panel *w, int64_t i, const int panel, const uint32_t *words,
                 const float *scales, int64_t scales_stride, const int count, float *sums) {
    floats held[PANEL_OF_MANY][VECTORS];
    UNROLL for (int a = 0; a < panel; a++)
        UNROLL for (int v = 0; v < count; v++) held[a][v] = (floats){0};
    for (int64_t s = 0; s < p->num_segments; s++) {
        integers whole[PANEL_OF_MANY][VECTORS];
        UNROLL for (int a = 0; a < panel; a++) {
            const integers begin = (integers){0} - (OFFSET ? w->sums[(i + a) * p->num_segments + s] : 0);
            UNROLL for (int v = 0; v < count; v++) whole[a][v] = begin;
        }
        const int64_t stop = (p->segments[s].stop + QUAD - 1) / QUAD;
        for (int64_t k = p->segments[s].start / QUAD; k < stop; k++) {
            integers x[VECTORS];
            UNROLL for (int v = 0; v < count; v++) memcpy(&x[v], words + (k * count + v) * LANES, sizeof x[v]);
            UNROLL for (int a = 0; a < panel; a++) {
#if QUAD == 4
                const floats word = to_all_lanes(w->rows[i + a] + k * QUAD);
#else
                const floats word = to_all_lanes(w->wide + (i + a) * w->stride + k * QUAD);
#endif
                UNROLL for (int v = 0; v < count; v++) whole[a][v] = dot(whole[a][v], x[v], (integers)word);
            }
        }
        UNROLL for (int v = 0; v < count; v++) {
            const floats scale = take(scales + s * scales_stride + v * LANES, FLOAT32);
            UNROLL for (int a = 0; a < panel; a++)
                held[a][v] += __builtin_convertvector(whole[a][v], floats) *
                              (scale * w->scales[(i + a) * p->num_segments + s]);
        }
    }
    UNROLL for (int a = 0; a < panel; a++)
        UNROLL for (int v = 0; v < count; v++) memcpy(sums + (a * VECTORS + v) * LANES, &held[a][v], sizeof held[a][v]);
}

INLINE void many_of_panel(const struct product *p, const struct panel *w, int64_t i, const int panel,
                          const struct lanes *x, int64_t block, float *sums) {
    const int64_t first = first_vector(x, block), count = first_vector(x, block + 1) - first;
    const uint32_t *words = x->words + first * LANES * x->width;
    const float *scales = x->scales + first * LANES;
    switch (count) {
        case 1: many(p, w, i, panel, words, scales, x->vectors * LANES, 1, sums); break;
#if VECTORS == 3
        case 3: many(p, w, i, panel, words, scales, x->vectors * LANES, 3, sums); break;
#endif
        default: many(p, w, i, panel, words, scales, x->vectors * LANES, 2, sums);
    }
}

/* Store sums[OUTPUTS][VECTORS * LANES] of one block: outputs n .. n + count. */
static void put_block(const struct product *p, const struct lanes *x, int64_t block, int64_t n, int64_t count,
                      const float *sums) {
    const int64_t first = first_vector(x, block), vectors = first_vector(x, block + 1) - first;
    const size_t size = size_of(p->type);
    for (int64_t v = 0; v < vectors; v++) {
        const int64_t row = (first + v) * LANES, rows = x->rows - row < LANES ? x->rows - row : LANES;
        for (int64_t part = 0; part < count; part += LANES) {
            const int some = count - part < LANES ? (int)(count - part) : LANES;
            floats square[LANES], bias = {0};
            if (p->bias) bias = take_some(p->bias + (n + part) * size, some, p->type);
            UNROLL for (int i = 0; i < LANES; i++)
                square[i] = take(sums + ((part + i) * VECTORS + v) * LANES, FLOAT32);
            transpose_square(square);
            for (int t = 0; t < rows; t++)
                give_some(p->outputs + ((row + t) * p->outputs_stride + n + part) * size, square[t] + bias, some, p->type);
        }
    }
}
