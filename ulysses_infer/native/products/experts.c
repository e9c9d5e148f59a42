/* Products of tokens, sorted by expert, with the matrices of their experts. How many each expert has is read from memory
 * here, so the caller need not know. Matrices of experts without tokens are not read.
 *
 * Matrices are stored by output, as those of linear layers, or by input (transposed), as some models do.
 */
#include "call.h"
#include "few_rows.h"
#include "panels.h"
#include "transposed.h"
#ifdef HAS_BFLOAT16_DOT
#include "pairs.h"
#endif

enum kernel { FEW, PANELS, PAIRS };

/* The products of all experts, in one task per group of outputs. */
struct experts {
    struct product whole; /* of all rows; the weight is that of the first expert */
    const int32_t *ends;  /* rows of expert e end before `ends[e]` */
    int64_t count, expert_stride, bias_stride; /* strides: elements from one expert to the next */
    const uint8_t *kernels; /* `enum kernel` for each number of rows up to `most`, which stands for more rows, too */
    int64_t most;
    enum type type;
};

/* The product of one expert. */
static struct product product_of(const struct experts *x, int64_t e) {
    const int64_t size = size_of(x->type), start = e ? x->ends[e - 1] : 0;
    struct product p = x->whole;
    p.inputs += start * p.inputs_stride * size, p.outputs += start * p.outputs_stride * size;
    p.weight += e * x->expert_stride * size, p.num_rows = x->ends[e] - start;
    if (p.bias) p.bias += e * x->bias_stride * size;
    return p;
}

static enum kernel kernel_of(const struct experts *x, int64_t rows) {
    return x->kernels[rows < x->most ? rows : x->most];
}

/* The products of experts with few rows: all in one parallel loop, because each of them is small. `run` computes
 * `outputs` outputs. */
static int multiply_few_of_all(const struct experts *x, void (*run)(const struct product *p, int64_t group),
                               const int64_t outputs) {
    struct product *found = malloc((x->count + 1) * sizeof *found);
    int64_t some = 0, work = 0;
    if (!found) return 1;
    for (int64_t e = 0; e < x->count; e++) {
        const struct product p = product_of(x, e);
        if (p.num_rows && kernel_of(x, p.num_rows) == FEW)
            found[some++] = p, work += p.num_rows * p.num_outputs * p.width;
    }
    const int64_t groups = (x->whole.num_outputs + outputs - 1) / outputs;
#pragma omp parallel for schedule(static) if (work >= 2 * (int64_t)WORK_A_THREAD)
    for (int64_t task = 0; task < some * groups; task++) run(&found[task / groups], task % groups);
    free(found);
    return 0;
}

/* Whether pairs are multiplied, which processors without the instruction leave to the panels. */
#ifdef HAS_BFLOAT16_DOT
#define MULTIPLY_PAIRS(p) multiply_pairs(p)
#define HAS_PAIRS 1
#else
#define MULTIPLY_PAIRS(p) 0
#define HAS_PAIRS 0
#endif

/* The products of experts with more rows, one after another. */
static int multiply_many_of_all(const struct experts *x, const struct panel_kernel *kernel) {
    int failed = 0;
    for (int64_t e = 0; e < x->count && !failed; e++) {
        const struct product p = product_of(x, e);
        const enum kernel chosen = p.num_rows ? kernel_of(x, p.num_rows) : FEW;
        if (chosen == FEW) continue;
        const int in_pairs = HAS_PAIRS && chosen == PAIRS && x->type == BFLOAT16 && p.width % 2 == 0;
        failed = !(in_pairs ? MULTIPLY_PAIRS(&p) : multiply_panels(&p, 1, kernel));
    }
    return failed;
}

#define PARAMETERS                                                                                                  \
    const char *inputs, const char *weight, const char *bias, char *outputs, const int32_t *ends, int64_t count,     \
        int64_t num_outputs, int64_t width, int64_t inputs_stride, int64_t weight_stride, int64_t expert_stride,     \
        int64_t bias_stride, const uint8_t *kernels, int64_t most
#define ARGUMENTS                                                                                                   \
    ADDRESS(0), ADDRESS(1), ADDRESS(2), ADDRESS(3), ADDRESS(4), NUMBER(5), NUMBER(6), NUMBER(7), NUMBER(8),          \
        NUMBER(9), NUMBER(10), NUMBER(11), ADDRESS(12), NUMBER(13)
#define EXPERTS(type)                                                                                               \
    {{inputs, weight, bias, outputs, 0, num_outputs, width, inputs_stride, weight_stride, num_outputs},             \
     ends, count, expert_stride, bias_stride, kernels, most, type}

/* Return 0, or 1 if out of memory. Rows after the last expert's are not written. */
#define KERNELS(name, type)                                                                                         \
    STORED_ROWS(name, type)                                                                                         \
    static void columns_of_##name(const struct product *p, int64_t group) { columns_of(p, group, type); }           \
    INLINE void gather_##name(const struct product *p, int64_t n, int64_t k, int64_t count, float *to) {            \
        gather_as(p, n, k, count, to, type);                                                                        \
    }                                                                                                               \
    static void run_transposed_##name(const struct product *p, const struct columns *x, int64_t n, int64_t count,   \
                                      float *memory) {                                                              \
        run_group(p, x, n, count, memory, gather_##name, 0, size_of(type), type);                                   \
    }                                                                                                               \
    int experts_##name(PARAMETERS) {                                                                                \
        const struct experts x = EXPERTS(type);                                                                     \
        const struct panel_kernel kernel = {transpose_##name, run_##name, size_of(type)};                           \
        return multiply_few_of_all(&x, few_rows_of_##name, WIDE_PANEL) || multiply_many_of_all(&x, &kernel);                    \
    }                                                                                                               \
    int transposed_experts_##name(PARAMETERS) {                                                                     \
        const struct experts x = EXPERTS(type);                                                                     \
        const struct panel_kernel kernel = {transpose_##name, run_transposed_##name, size_of(type)};                \
        return multiply_few_of_all(&x, columns_of_##name, RUN) || multiply_many_of_all(&x, &kernel);                 \
    }                                                                                                               \
    STATUS_CALL(experts_##name, ARGUMENTS)                                                                          \
    STATUS_CALL(transposed_experts_##name, ARGUMENTS)

KERNELS(bfloat16, BFLOAT16)
KERNELS(float16, FLOAT16)
KERNELS(float32, FLOAT32)
