/* Matrix products with quantised weights: read as they are stored, expanded a few outputs at a time in the cache.
 *
 * Integer products quantise the inputs to 8 bits, with one scale per row and segment of inputs. Float products take the
 * inputs as they are. Few rows run at the memory speed of the stored bytes; with many, expanding costs little.
 */
#include "call.h"
#include "float_products.h"

#define WORK_A_THREAD (1 << 17) /* least multiplications per thread */

INLINE void *space(int64_t bytes) { return aligned_alloc(LINE, (bytes + 2 * LINE - 1) / LINE * LINE); }

/* One thread's memory for an expanded panel. Returns 0 if there is none. */
static int make_panel(const struct product *p, struct panel *w) {
    const int64_t segments = OUTPUTS * p->num_segments;
    w->stride = padded(p->weight->inputs);
    w->bytes = space(OUTPUTS * w->stride), w->scales = space(segments * 4), w->sums = space(segments * 4);
    w->zeros = space(segments);
    w->wide = QUAD == 2 ? space(OUTPUTS * w->stride * 2) : 0;
    return w->bytes && w->scales && w->sums && w->zeros && (QUAD != 2 || w->wide);
}

static void free_panel(struct panel *w) { free(w->bytes), free(w->scales), free(w->sums), free(w->zeros), free(w->wide); }

INLINE int is_worth(const struct product *p) {
    return p->num_rows * p->weight->outputs * p->weight->inputs >= 2 * (int64_t)WORK_A_THREAD;
}

static int multiply_few(const struct product *p) {
    const int64_t segments = p->num_segments, stride = padded(p->weight->inputs), size = size_of(p->type);
    const int64_t outputs = p->weight->outputs;
    struct quantised x = {space(p->num_rows * stride * sizeof(code)), space(p->num_rows * segments * 4), stride};
    int failed = !x.codes || !x.scales;
    for (int64_t t = 0; t < p->num_rows && !failed; t++)
        for (int64_t s = 0; s < segments; s++) {
            const int64_t start = p->segments[s].start, count = p->segments[s].stop - start;
            const char *from = p->inputs + (t * p->inputs_stride + start) * size;
            x.scales[t * segments + s] = quantise(from, count, p->type, x.codes + t * stride + start);
        }
#pragma omp parallel if (is_worth(p) && !failed) reduction(| : failed)
    {
        struct panel w;
        const int ready = make_panel(p, &w);
        failed |= !ready;
#pragma omp for schedule(static)
        for (int64_t group = 0; group < (outputs + OUTPUTS - 1) / OUTPUTS; group++) {
            const int64_t n = group * OUTPUTS, count = outputs - n < OUTPUTS ? outputs - n : OUTPUTS;
            if (failed) continue;
            expand(p, n, count, 0, &w);
            int64_t i = 0;
            for (; i + PANEL_OF_FEW <= count; i += PANEL_OF_FEW) few_of_panel(p, &w, i, PANEL_OF_FEW, &x, n);
            for (; i < count; i++) few_of_panel(p, &w, i, 1, &x, n);
        }
        free_panel(&w);
    }
    free(x.codes), free(x.scales);
    return failed;
}

/* Rows whose quantised inputs fit in the L2 cache: whole blocks. */
static int64_t rows_at_a_time(const struct product *p) {
    const int64_t block = VECTORS * LANES, fit = NEAR / (p->weight->inputs * (int64_t)sizeof(code) + 1) / block * block;
    return fit > block ? fit : block;
}

/* The rows that `x` has room for. */
static int multiply_lanes(const struct product *p, const struct lanes *x) {
    const int64_t outputs = p->weight->outputs;
    int failed = 0;
#pragma omp parallel if (is_worth(p)) reduction(| : failed)
    {
        struct panel w;
        code *rows = space(LANES * padded(p->weight->inputs) * sizeof(code));
        float *sums = space(OUTPUTS * VECTORS * LANES * 4);
        failed |= !make_panel(p, &w) || !rows || !sums;
#pragma omp for schedule(static)
        for (int64_t block = 0; block < x->blocks; block++)
            for (int64_t v = 0; v < first_vector(x, block + 1) - first_vector(x, block) && !failed; v++)
                fill_lanes(p, x, block, v, rows);
#pragma omp for schedule(static)
        for (int64_t group = 0; group < (outputs + OUTPUTS - 1) / OUTPUTS; group++) {
            const int64_t n = group * OUTPUTS, count = outputs - n < OUTPUTS ? outputs - n : OUTPUTS;
            if (failed) continue;
            expand(p, n, count, 1, &w);
            for (int64_t block = 0; block < x->blocks; block++) {
                int64_t i = 0;
                for (; i + PANEL_OF_MANY <= count; i += PANEL_OF_MANY)
                    many_of_panel(p, &w, i, PANEL_OF_MANY, x, block, sums + i * VECTORS * LANES);
                for (; i < count; i++) many_of_panel(p, &w, i, 1, x, block, sums + i * VECTORS * LANES);
                put_block(p, x, block, n, count, sums);
            }
        }
        free_panel(&w), free(rows), free(sums);
    }
    return failed;
}

static int multiply_many(const struct product *p) {
    const int64_t most = rows_at_a_time(p), held = p->num_rows < most ? p->num_rows : most;
    const int64_t lanes = (held + LANES - 1) / LANES * LANES, width = (p->weight->inputs + QUAD - 1) / QUAD;
    struct lanes x = {space(lanes * width * 4), space(lanes * p->num_segments * 4), 0, 0, 0, width};
    int failed = !x.words || !x.scales;
    for (int64_t row = 0; row < p->num_rows && !failed; row += most) {
        struct product part = *p;
        part.inputs += row * p->inputs_stride * size_of(p->type);
        part.outputs += row * p->outputs_stride * size_of(p->type);
        part.num_rows = x.rows = p->num_rows - row < most ? p->num_rows - row : most;
        x.vectors = (x.rows + LANES - 1) / LANES, x.blocks = (x.vectors + VECTORS - 1) / VECTORS;
        failed = multiply_lanes(&part, &x);
    }
    free(x.words), free(x.scales);
    return failed;
}

static int multiply_floats(const struct product *p) {
    const int64_t outputs = p->weight->outputs, width = p->weight->inputs, stride = padded(width);
    float *x = space(p->num_rows * stride * sizeof(float));
    int failed = !x;
    for (int64_t t = 0; t < p->num_rows && x; t++) {
        for (int64_t k = 0; k < width; k += LANES) {
            const int some = width - k < LANES ? (int)(width - k) : LANES;
            const floats values = take_some(p->inputs + (t * p->inputs_stride + k) * size_of(p->type), some, p->type);
            memcpy(x + t * stride + k, &values, some * sizeof *x);
        }
        memset(x + t * stride + width, 0, (stride - width) * sizeof *x);
    }
#pragma omp parallel if (is_worth(p)) reduction(| : failed)
    {
        int8_t *bytes = space(PANEL_OF_FLOATS * (width + LINE));
        floats *sums = space(PANEL_OF_FLOATS * p->num_rows * sizeof(floats));
        failed |= !bytes || !sums;
#pragma omp for schedule(static)
        for (int64_t group = 0; group < (outputs + PANEL_OF_FLOATS - 1) / PANEL_OF_FLOATS; group++) {
            const int64_t n = group * PANEL_OF_FLOATS, left = outputs - n;
            if (!failed) float_panel(p, n, left < PANEL_OF_FLOATS ? left : PANEL_OF_FLOATS, x, stride, bytes, sums);
        }
        free(bytes), free(sums);
    }
    free(x);
    return failed;
}

/* inputs: [rows][stride] of `type`; outputs: [rows][outputs]. Returns 0, or 1 if there is no memory. */
int quantised_product(const struct stored *weight, const char *inputs, const char *bias, char *outputs,
                      int64_t num_rows, int64_t inputs_stride, int64_t type, int64_t as_integers) {
    struct segment *segments = malloc(most_segments(weight) * sizeof *segments);
    if (!segments) return 1;
    struct product p = {weight,  inputs, bias, outputs, num_rows, inputs_stride, weight->outputs, (enum type)type,
                        segments, find_segments(weight, segments)};
    int failed = 0;
    if (num_rows && weight->outputs) {
        if (!as_integers)
            failed = multiply_floats(&p);
        else if (num_rows <= FEW_ROWS)
            failed = multiply_few(&p);
        else
            failed = multiply_many(&p);
    }
    free(segments);
    return failed;
}

/* Rows sorted by expert: those of expert e end before row `ends[e]`. Rows after the last are not written. */
int quantised_experts(const struct stored *weight, const char *inputs, char *outputs, const int32_t *ends,
                      int64_t experts, int64_t inputs_stride, int64_t type, int64_t as_integers) {
    const int64_t size = type == FLOAT32 ? 4 : 2;
    int failed = 0;
    for (int64_t e = 0, start = 0; e < experts && !failed; start = ends[e++]) {
        const struct stored one = of_expert(weight, e);
        failed = quantised_product(&one, inputs + start * inputs_stride * size, 0,
                                   outputs + start * weight->outputs * size, ends[e] - start, inputs_stride, type,
                                   as_integers);
    }
    return failed;
}

STATUS_CALL(quantised_product, ADDRESS(0), ADDRESS(1), ADDRESS(2), ADDRESS(3), NUMBER(4), NUMBER(5), NUMBER(6), NUMBER(7))
STATUS_CALL(quantised_experts, ADDRESS(0), ADDRESS(1), ADDRESS(2), ADDRESS(3), NUMBER(4), NUMBER(5), NUMBER(6), NUMBER(7))
