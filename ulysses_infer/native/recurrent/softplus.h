/* log(1 + e^x), for gates of recurrences. */
#pragma once
#include "vector.h"

/* log(1 + u) for u in [0, 1], with a small relative error: 2 artanh(u / (2 + u)) as a series. */
INLINE floats log1p_of(floats u) {
    const floats s = u / (u + 2.0f), square = s * s;
    floats sum = splat(1.0f / 15);
    sum = sum * square + 1.0f / 13;
    sum = sum * square + 1.0f / 11;
    sum = sum * square + 1.0f / 9;
    sum = sum * square + 1.0f / 7;
    sum = sum * square + 1.0f / 5;
    sum = sum * square + 1.0f / 3;
    sum = sum * square + 1.0f;
    return 2.0f * s * sum;
}

INLINE floats softplus_of(floats x) {
    const floats size = (floats)((integers)x | INT32_MIN); /* -|x| */
    return larger_of(x, splat(0.0f)) + log1p_of(exp2_of(size * LOG2_E, FLOAT32));
}

INLINE float softplus(float x) { return softplus_of(splat(x))[0]; }
