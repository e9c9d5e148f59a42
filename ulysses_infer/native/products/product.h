/* A matrix product: outputs[t, n] = sum over k of inputs[t, k] * weight[n, k], plus bias[n]. */
#pragma once
#include "vector.h"

#define WORK_A_THREAD (1 << 17) /* least multiplications per thread */

struct product {
    const char *inputs, *weight, *bias; /* bias may be null */
    char *outputs;
    int64_t num_rows, num_outputs, width;                  /* T, N, K */
    int64_t inputs_stride, weight_stride, outputs_stride; /* elements from one row to the next */
};

/* Whether more than one thread is worth it. */
INLINE int is_large(const struct product *p) {
    return p->num_rows * p->num_outputs * p->width >= 2 * (int64_t)WORK_A_THREAD;
}

/* Element `i` of an array. */
INLINE float one_of(const char *array, int64_t i, enum type type) {
    if (type == FLOAT32) return ((const float *)array)[i];
    return type == FLOAT16 ? float_of_half(((const float16 *)array)[i]) : float_of(((const bfloat16 *)array)[i]);
}

INLINE float bias_of(const struct product *p, int64_t n, enum type type) {
    return p->bias ? one_of(p->bias, n, type) : 0;
}

/* Store one output, rounded. */
INLINE void put_output(const struct product *p, int64_t t, int64_t n, float value, enum type type) {
    const int64_t place = t * p->outputs_stride + n;
    if (type == FLOAT32)
        ((float *)p->outputs)[place] = value;
    else if (type == FLOAT16)
        ((float16 *)p->outputs)[place] = half_of(value);
    else
        ((bfloat16 *)p->outputs)[place] = bfloat16_of(value);
}
