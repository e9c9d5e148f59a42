/* Matrix products: the kernels of each type. Which one is fastest for a number of rows is measured (matmul.py).
 *
 * With any one of them a row's result does not depend on the other rows of the batch. They differ only in the order of
 * sums.
 */
#include "call.h"
#include "panels.h"
#include "several_rows.h"
#ifdef HAS_BFLOAT16_DOT
#include "pairs.h"
#endif

/* `run` is `few_rows_of` for a constant type: the compiler does not pass constants into parallel regions. */
static void multiply_few(const struct product *p, void (*run)(const struct product *p, int64_t group)) {
#pragma omp parallel for schedule(static) if (is_large(p))
    for (int64_t group = 0; group < groups_of(p); group++) run(p, group);
}

#define PARAMETERS                                                                                            \
    const char *inputs, const char *weight, const char *bias, char *outputs, int64_t num_rows,               \
        int64_t num_outputs, int64_t width, int64_t inputs_stride, int64_t weight_stride
#define PRODUCT                                                                                               \
    {inputs, weight, bias, outputs, num_rows, num_outputs, width, inputs_stride, weight_stride, num_outputs}
#define ARGUMENTS                                                                                             \
    ADDRESS(0), ADDRESS(1), ADDRESS(2), ADDRESS(3), NUMBER(4), NUMBER(5), NUMBER(6), NUMBER(7), NUMBER(8)

/* Up to MOST_JOINT products of the same inputs. */
#define OF_ONE(i) const char *weight_##i, const char *bias_##i, char *outputs_##i, int64_t num_outputs_##i, int64_t stride_##i
#define JOINT_PARAMETERS                                                                                      \
    const char *inputs, int64_t num_rows, int64_t width, int64_t count, OF_ONE(0), OF_ONE(1), OF_ONE(2)
#define ONE(i)                                                                                                \
    {inputs, weight_##i, bias_##i, outputs_##i, num_rows, num_outputs_##i, width, width, stride_##i, num_outputs_##i}
#define JOINT_PRODUCTS {ONE(0), ONE(1), ONE(2)}
#define ARGUMENTS_OF(i) ADDRESS(i), ADDRESS(i + 1), ADDRESS(i + 2), NUMBER(i + 3), NUMBER(i + 4)
#define JOINT_ARGUMENTS ADDRESS(0), NUMBER(1), NUMBER(2), NUMBER(3), ARGUMENTS_OF(4), ARGUMENTS_OF(9), ARGUMENTS_OF(14)

/* Kernels return 0, or 1 if out of memory. */
#define KERNELS(name, type)                                                                                  \
    STORED_ROWS(name, type)                                                                                  \
    static void interleave_##name(const struct product *p, const struct interleaved *x, int64_t row) {       \
        interleave_row(p, x, row, type);                                                                     \
    }                                                                                                        \
    static void several_##name(const struct product *p, const struct interleaved *x, int64_t n,              \
                               int64_t apart) {                                                              \
        several_outputs_of(p, x, n, apart, type);                                                            \
    }                                                                                                        \
    int few_##name(PARAMETERS) {                                                                             \
        const struct product p = PRODUCT;                                                                    \
        const struct several_kernel several = {interleave_##name, several_##name};                           \
        if (num_rows >= FROM_SEVERAL && step_of(type) == LANES) return !multiply_several(&p, &several);      \
        multiply_few(&p, few_rows_of_##name);                                                                \
        return 0;                                                                                            \
    }                                                                                                        \
    int panels_##name(PARAMETERS) {                                                                          \
        const struct product p = PRODUCT;                                                                    \
        const struct panel_kernel kernel = {transpose_##name, run_##name, size_of(type)};                    \
        return !multiply_panels(&p, 1, &kernel);                                                             \
    }                                                                                                        \
    int joint_##name(JOINT_PARAMETERS) {                                                                     \
        const struct product p[] = JOINT_PRODUCTS;                                                           \
        const struct panel_kernel kernel = {transpose_##name, run_##name, size_of(type)};                    \
        return !multiply_panels(p, count, &kernel);                                                          \
    }                                                                                                        \
    STATUS_CALL(joint_##name, JOINT_ARGUMENTS)                                                               \
    STATUS_CALL(few_##name, ARGUMENTS)                                                                       \
    STATUS_CALL(panels_##name, ARGUMENTS)

KERNELS(bfloat16, BFLOAT16)
KERNELS(float16, FLOAT16)
KERNELS(float32, FLOAT32)

#ifdef HAS_BFLOAT16_DOT
/* Pairs of bfloat16; an odd width is left to the panels. */
int pairs_bfloat16(PARAMETERS) {
    const struct product p = PRODUCT;
    if (width % 2) return panels_bfloat16(inputs, weight, bias, outputs, num_rows, num_outputs, width, inputs_stride, weight_stride);
    return !multiply_pairs(&p);
}
STATUS_CALL(pairs_bfloat16, ARGUMENTS)
#endif
