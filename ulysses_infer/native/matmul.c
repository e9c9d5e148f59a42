/* Matrix products of a few input rows: the weight is read once, in order, at memory speed.
 *
 * outputs[t, n] = sum over k of inputs[t, k] * weight[n, k], plus bias[n]. A panel of weight rows is multiplied
 * with a block of input rows, with all sums in registers, while the next panel is prefetched. Every sum runs over k in
 * the same order for any number of input rows, so a row's result does not depend on the other rows of the batch. bfloat16
 * products of 13 to 16 rows, and of 28 or more, use many_rows.h, for which the same holds.
 */
#include "call.h"
#include "vector.h"
#ifdef HAS_BFLOAT16_DOT
#include "many_rows.h"
#endif

#if defined(HAS_AVX512) || defined(__aarch64__)
#define MOST_ROWS 6 /* sums fill the 32 vector registers */
#else
#define MOST_ROWS 2
#endif
/* The most rows for which this is faster than torch (measured); lower on CPUs with matrix units. */
#ifdef __AMX_BF16__
const int64_t most_rows_bfloat16 = 8;
#elif defined(HAS_BFLOAT16_DOT)
const int64_t most_rows_bfloat16 = INT64_MAX;
#else
const int64_t most_rows_bfloat16 = 16;
#endif
const int64_t most_rows_float32 = 64;

#define WIDE_PANEL 8
#define PANEL 4
#define WORK_A_THREAD (1 << 17) /* least multiplications per thread */

struct product {
    const char *inputs, *weight, *bias; /* bias may be null */
    char *outputs;
    int64_t num_rows, num_outputs, width;                  /* T, N, K */
    int64_t inputs_stride, weight_stride, outputs_stride; /* elements from one row to the next */
};

INLINE float bias_of(const struct product *p, int64_t n, enum type type) {
    if (!p->bias) return 0;
    return type == FLOAT32 ? ((const float *)p->bias)[n] : float_of(((const bfloat16 *)p->bias)[n]);
}

INLINE void put(const struct product *p, int64_t t, int64_t n, float sum, enum type type) {
    int64_t place = t * p->outputs_stride + n;
    float value = sum + bias_of(p, n, type);
    if (type == FLOAT32)
        ((float *)p->outputs)[place] = value;
    else
        ((bfloat16 *)p->outputs)[place] = bfloat16_of(value);
}

/* Rows t .. t+rows of the inputs with rows n .. n+panel of the weight. Prefetches the rows `ahead` .. `end` of the
 * weight, if any. */
INLINE void tile(const struct product *p, int64_t t, int64_t n, const int rows, const int panel, int64_t ahead,
                 int64_t end, enum type type) {
    const size_t size = size_of(type);
    const int step = step_of(type);
    const int64_t stride = p->weight_stride * size;
    const char *weight = p->weight + n * stride, *input = p->inputs + t * p->inputs_stride * size;
    const char *next = p->weight + ahead * stride;
    floats sums[WIDE_PANEL][MOST_ROWS];
    UNROLL for (int i = 0; i < panel; i++)
        UNROLL for (int j = 0; j < rows; j++) sums[i][j] = (floats){0};
    int64_t k = 0;
    for (; k + step <= p->width; k += step) {
        const char *line = next + k * size;
        for (int64_t i = ahead; i < end; i++, line += stride) __builtin_prefetch(line, 0, 2);
        floats x[MOST_ROWS];
        UNROLL for (int j = 0; j < rows; j++) x[j] = load(input + (j * p->inputs_stride + k) * size, type);
        UNROLL for (int i = 0; i < panel; i++) {
            floats w = load(weight + i * stride + k * size, type);
            UNROLL for (int j = 0; j < rows; j++) sums[i][j] = multiply_add(sums[i][j], w, x[j], type);
        }
    }
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
            for (int m = 0; m < count; m++) put(p, t + j, n + i + m, four[m], type);
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
#if MOST_ROWS > 2
            case 3: tile(p, t, n, 3, panel, ahead, stop, type); break;
            case 4: tile(p, t, n, 4, panel > PANEL ? PANEL : panel, ahead, stop, type); break;
            case 5: tile(p, t, n, 5, panel > PANEL ? PANEL : panel, ahead, stop, type); break;
            case 6: tile(p, t, n, 6, panel > PANEL ? PANEL : panel, ahead, stop, type); break;
#endif
        }
        t += rows;
    }
}

INLINE void multiply(const struct product *p, enum type type) {
    const int64_t wide = p->num_rows * WIDE_PANEL <= MOST_ROWS * PANEL ? WIDE_PANEL : PANEL;
    const int64_t groups = (p->num_outputs + WIDE_PANEL - 1) / WIDE_PANEL;
    const int worth = p->num_rows * p->num_outputs * p->width >= 2 * (int64_t)WORK_A_THREAD;
#pragma omp parallel for schedule(static) if (worth)
    for (int64_t group = 0; group < groups; group++) {
        int64_t n = group * WIDE_PANEL, stop = n + WIDE_PANEL < p->num_outputs ? n + WIDE_PANEL : p->num_outputs;
        if (wide == WIDE_PANEL && n + WIDE_PANEL <= stop) panel_of(p, n, WIDE_PANEL, p->num_outputs, type), n = stop;
        for (; n + PANEL <= stop; n += PANEL) panel_of(p, n, PANEL, p->num_outputs, type);
        for (; n < stop; n++) panel_of(p, n, 1, p->num_outputs, type);
    }
}

#ifdef HAS_BFLOAT16_DOT
/* Rows n .. n + GROUP of the weight, or fewer at the end, with a block of the inputs. */
static void group_of(const struct product *p, const struct pairs *x, int64_t block, int64_t n) {
    const int64_t bytes = p->weight_stride * sizeof(bfloat16), left = p->num_outputs - n, first = start_of(x, block);
    const int64_t count = left < GROUP ? left : GROUP, vectors = start_of(x, block + 1) - first;
    const int64_t last = x->rows - first * LANES, rows = last < vectors * LANES ? last : vectors * LANES;
    const uint32_t *values = x->values + first * LANES * (p->width / 2);
    const char *weight = p->weight + n * bytes;
    float bias[GROUP] = {0}, sums[GROUP * MOST_VECTORS * LANES];
    for (int64_t i = 0; i < count; i++) bias[i] = bias_of(p, n + i, BFLOAT16);
#define TAKE(panel)                                                                                             \
    for (; i + panel <= count; i += panel)                                                                      \
        add_block(values, vectors, weight + i * bytes, bytes, panel, p->width, weight + (i + panel) * bytes,    \
                  block ? 0 : (int)(left - i - panel < panel ? left - i - panel : panel), sums + i * MOST_VECTORS * LANES)
    int64_t i = 0;
    if (vectors == 1) TAKE(2 * PANEL_TOGETHER);
    TAKE(PANEL_TOGETHER);
    TAKE(1);
#undef TAKE
    bfloat16 *to = (bfloat16 *)p->outputs + first * LANES * p->outputs_stride + n;
    if (count == GROUP)
        put_group(sums, bias, rows, to, p->outputs_stride);
    else
        put_rest(sums, bias, rows, to, p->outputs_stride, count);
}

/* Input rows that are transposed at a time: as many whole blocks as fit in the L2 cache. */
static int64_t rows_at_a_time(int64_t width) {
    const int64_t block = MOST_VECTORS * LANES, fit = NEAR_BYTES / (width * (int64_t)sizeof(bfloat16)) / block * block;
    return fit > block ? fit : block;
}

/* Returns 0 if there is no memory for the transposed inputs. */
static int multiply_together(const struct product *p) {
    const int64_t most = rows_at_a_time(p->width), held = p->num_rows < most ? p->num_rows : most;
    uint32_t *values = aligned_alloc(LINE, (held + LANES - 1) / LANES * LANES * p->width * sizeof(bfloat16));
    if (!values) return 0;
    const int worth = p->num_rows * p->num_outputs * p->width >= 2 * (int64_t)WORK_A_THREAD;
#pragma omp parallel if (worth)
    for (int64_t row = 0; row < p->num_rows; row += most) {
        const struct pairs x = pairs_of(values, p->num_rows - row < most ? p->num_rows - row : most);
        struct product part = *p;
        part.inputs += row * p->inputs_stride * sizeof(bfloat16);
        part.outputs += row * p->outputs_stride * sizeof(bfloat16);
#pragma omp for schedule(static)
        for (int64_t block = 0; block < x.blocks; block++)
            transpose_inputs(&x, block, (const bfloat16 *)part.inputs, p->width, p->inputs_stride);
#pragma omp for schedule(static)
        for (int64_t group = 0; group < (p->num_outputs + GROUP - 1) / GROUP; group++)
            for (int64_t block = 0; block < x.blocks; block++) group_of(&part, &x, block, group * GROUP);
    }
    free(values);
    return 1;
}
#endif

void matmul_bfloat16(const char *inputs, const char *weight, const char *bias, char *outputs, int64_t num_rows,
                     int64_t num_outputs, int64_t width, int64_t inputs_stride, int64_t weight_stride) {
    struct product p = {inputs, weight, bias, outputs, num_rows, num_outputs, width, inputs_stride, weight_stride,
                        num_outputs};
#ifdef HAS_BFLOAT16_DOT
    const int fits = ROWS_TOGETHER(num_rows) && width % 2 == 0;
    if (fits && multiply_together(&p)) return;
#endif
    multiply(&p, BFLOAT16);
}

void matmul_float32(const char *inputs, const char *weight, const char *bias, char *outputs, int64_t num_rows,
                    int64_t num_outputs, int64_t width, int64_t inputs_stride, int64_t weight_stride) {
    struct product p = {inputs, weight, bias, outputs, num_rows, num_outputs, width, inputs_stride, weight_stride,
                        num_outputs};
    multiply(&p, FLOAT32);
}

#define ARGUMENTS                                                                                               \
    ADDRESS(0), ADDRESS(1), ADDRESS(2), ADDRESS(3), NUMBER(4), NUMBER(5), NUMBER(6), NUMBER(7), NUMBER(8)
CALL(matmul_bfloat16, ARGUMENTS)
CALL(matmul_float32, ARGUMENTS)
