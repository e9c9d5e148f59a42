/* Matrix products with quantised weights: read as they are stored, expanded a panel at a time in the cache.
 *
 * Integer products quantise the inputs to 8 bits, with one scale per row and segment of inputs. Float products take the
 * inputs as they are. Few rows run at the memory speed of the stored bytes; with many, expanding costs little.
 */
#include "call.h"
#include "float_products.h"
#include "nibble_rows.h"
#include "tasks.h"

#define WORK_A_THREAD (1 << 17) /* least multiplications per thread */

INLINE void *space(int64_t bytes) { return aligned_alloc(LINE, (bytes + 2 * LINE - 1) / LINE * LINE); }

/* One thread's memory for a panel. Returns 0 if there is none. */
static int make_panel(struct panel *w) {
    const int64_t scales = PANEL_SEGMENTS * OUTPUTS * sizeof(float);
    w->words = space(PANEL_WORDS * OUTPUTS * 4), w->bytes = space(OUTPUTS * ROW_BYTES);
    w->scales = space(scales), w->minima = space(scales);
    if (w->minima) memset(w->scales, 0, scales), memset(w->minima, 0, scales);
    return w->words && w->bytes && w->scales && w->minima;
}

static void free_panel(struct panel *w) { free(w->words), free(w->bytes), free(w->scales), free(w->minima); }

INLINE int is_worth(const struct product *p) {
    return p->num_rows * p->weight->outputs * p->weight->inputs >= 2 * (int64_t)WORK_A_THREAD;
}

/* Rows from `t` on, as many as `x` has. */
static int multiply_batch(const struct product *p, const struct cut *cut, const struct packed_inputs *x, int64_t t) {
    static void (*const forms[])(const struct panel *, const struct cut *, int64_t, int64_t,
                                 const struct packed_inputs *, float *) = {add_channels, add_bytes, add_nibbles};
    const int64_t outputs = p->weight->outputs;
    const enum form form = form_of(p->weight, cut);
    const struct tasks tasks = tasks_of((outputs + OUTPUTS - 1) / OUTPUTS, threads_for(is_worth(p)));
    int failed = 0;
#pragma omp parallel if (tasks.threads > 1) reduction(| : failed)
    {
        struct panel w;
        int8_t *codes = space(padded(p->weight->segment));
        float *sums = space(x->rows * OUTPUTS * sizeof *sums);
        failed |= !make_panel(&w) || !codes || !sums;
#pragma omp for schedule(static)
        for (int64_t block = 0; block < x->blocks; block++)
            if (!failed) pack_block(p, cut, x, block, t, codes);
        for (int64_t group; (group = take_task(&tasks)) >= 0;) {
            const int64_t n = group * OUTPUTS, count = outputs - n < OUTPUTS ? outputs - n : OUTPUTS;
            if (failed) continue;
            memset(sums, 0, x->rows * OUTPUTS * sizeof *sums);
            for (int64_t s = 0, end; s < cut->count; s = end) {
                end = panel_end(cut, s);
                fill_words(p->weight, cut, n, count, s, end, &w);
                fill_scales(p->weight, cut, n, count, cut->segments[s].group, cut->segments[end - 1].group + 1, &w);
                forms[form](&w, cut, s, end, x, sums);
            }
            put_sums(p, t, x->rows, n, count, sums);
        }
        free_panel(&w), free(codes), free(sums);
    }
    return failed;
}

static int multiply_integers(const struct product *p) {
    int64_t *first = space((p->num_segments + 1) * sizeof *first);
    if (!first) return 1;
    const struct cut cut = cut_of(p->weight, p->segments, p->num_segments, first);
    const int64_t most = p->num_rows < BATCH_ROWS ? p->num_rows : BATCH_ROWS, of_segments = most * cut.count;
    struct packed_inputs x = {.operands = space(most * first[cut.count] * 4), .num_operands = first[cut.count]};
    x.scales = space(of_segments * 4), x.sums = space(of_segments * 4), x.offsets = space(of_segments * 4);
    int failed = !x.operands || !x.scales || !x.sums || !x.offsets;
    for (int64_t t = 0; t < p->num_rows && !failed; t += x.rows) {
        x.rows = p->num_rows - t < most ? p->num_rows - t : most, x.blocks = (x.rows + TILE_ROWS - 1) / TILE_ROWS;
        failed = multiply_batch(p, &cut, &x, t);
    }
    free(first), free(x.operands), free(x.scales), free(x.sums), free(x.offsets);
    return failed;
}

static int multiply_byte_rows(const struct product *p) {
    const int64_t outputs = p->weight->outputs;
    char *memory = space(byte_rows_size(p));
    int8_t *narrow = space(padded(p->weight->segment));
    const int failed = !memory || !narrow;
    const struct byte_rows x = byte_rows_of(p, memory);
    if (!failed) quantise_for_bytes(&x, narrow);
    const struct tasks tasks = tasks_of(failed ? 0 : apart_of(outputs, STREAMS) / OUTPUTS, threads_for(is_worth(p)));
#pragma omp parallel if (tasks.threads > 1)
    for (int64_t number; (number = take_task(&tasks)) >= 0;) {
        const struct task task = task_of(outputs, number, STREAMS);
        byte_outputs(&x, &task);
    }
    free(memory), free(narrow);
    return failed;
}

static int multiply_nibble_rows(const struct product *p) {
    const int64_t outputs = p->weight->outputs;
    char *memory = space(nibble_bytes(p));
    int8_t *narrow = space(padded(p->weight->segment));
    const int failed = !memory || !narrow;
    const struct nibble_rows x = nibble_rows_of(p, memory);
    if (!failed) quantise_for_nibbles(&x, narrow);
    const struct tasks tasks =
        tasks_of(failed ? 0 : apart_of(outputs, NIBBLE_STREAMS) / OUTPUTS, threads_for(is_worth(p)));
#pragma omp parallel if (tasks.threads > 1)
    for (int64_t number; (number = take_task(&tasks)) >= 0;) {
        const struct task task = task_of(outputs, number, NIBBLE_STREAMS);
        nibble_outputs(&x, &task);
    }
    free(memory), free(narrow);
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

/* inputs: [rows][stride] of `type`; outputs: [rows][outputs]. by_rows: with up to so many rows, lanes are inputs
 * (integer_rows.h, nibble_rows.h); negative: nothing is quantised. Returns 0, or 1 if there is no memory. */
int quantised_product(const struct stored *weight, const char *inputs, const char *bias, char *outputs,
                      int64_t num_rows, int64_t inputs_stride, int64_t type, int64_t by_rows) {
    struct segment *segments = malloc(most_segments(weight) * sizeof *segments);
    if (!segments) return 1;
    struct product p = {weight,  inputs, bias, outputs, num_rows, inputs_stride, weight->outputs, (enum type)type,
                        segments, find_segments(weight, segments)};
    int failed = 0;
    if (num_rows && weight->outputs) {
        if (by_rows < 0)
            failed = multiply_floats(&p);
        else if (num_rows <= by_rows && has_byte_rows(weight))
            failed = multiply_byte_rows(&p);
        else if (num_rows <= by_rows && has_nibble_rows(weight))
            failed = multiply_nibble_rows(&p);
        else
            failed = multiply_integers(&p);
    }
    free(segments);
    return failed;
}

/* Rows sorted by expert: those of expert e end before row `ends[e]`. Rows after the last are not written. */
int quantised_experts(const struct stored *weight, const char *inputs, char *outputs, const int32_t *ends,
                      int64_t experts, int64_t inputs_stride, int64_t type, int64_t by_rows) {
    const int64_t size = type == FLOAT32 ? 4 : 2;
    int failed = 0;
    for (int64_t e = 0, start = 0; e < experts && !failed; start = ends[e++]) {
        const struct stored one = of_expert(weight, e);
        failed = quantised_product(&one, inputs + start * inputs_stride * size, 0,
                                   outputs + start * weight->outputs * size, ends[e] - start, inputs_stride, type,
                                   by_rows);
    }
    return failed;
}

STATUS_CALL(quantised_product, ADDRESS(0), ADDRESS(1), ADDRESS(2), ADDRESS(3), NUMBER(4), NUMBER(5), NUMBER(6), NUMBER(7))
STATUS_CALL(quantised_experts, ADDRESS(0), ADDRESS(1), ADDRESS(2), ADDRESS(3), NUMBER(4), NUMBER(5), NUMBER(6), NUMBER(7))
