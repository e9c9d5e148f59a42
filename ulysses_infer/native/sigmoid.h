/* Activations with a sigmoid, several vectors at a time. */
#pragma once
#include "vector.h"

#define TOGETHER 4 /* vectors of activations */

/* x / y for y from 1 to 2. */
INLINE floats divided(floats x, floats y, enum type type) {
#if defined(HAS_AVX512) || LANES == 8
    if (type == BFLOAT16) { /* error of about a float32 rounding, in a third of the time of a division */
#ifdef HAS_AVX512
        const floats guess = (floats)_mm512_rcp14_ps((__m512)y);
#else
        const floats guess = (floats)_mm256_rcp_ps((__m256)y);
#endif
        return x * (guess * (2.0f - y * guess));
    }
#endif
    return x / y;
}

/* x[v] / (1 + e^-z[v]) for `n` vectors, interleaved to hide the latency of each step. */
INLINE void times_sigmoid(floats *x, const floats *z, const int n, enum type type) {
    floats power[TOGETHER]; /* e^-|z|, at most 1 */
    integers positive[TOGETHER];
#define EACH UNROLL for (int v = 0; v < n; v++)
    EACH power[v] = exp2_of((floats)((integers)z[v] | INT32_MIN) * LOG2_E, FLOAT32);
    EACH positive[v] = z[v] > 0.0f;
    EACH x[v] *= blend(positive[v], splat(1.0f), power[v]);
    EACH x[v] = divided(x[v], 1.0f + power[v], type);
#undef EACH
}

INLINE void silu(floats *x, const int n, enum type type) {
    floats z[TOGETHER];
    UNROLL for (int v = 0; v < n; v++) z[v] = x[v];
    times_sigmoid(x, z, n, type);
}
