/* What stands between the matrix products of a decoder layer: norms, rotary positions, gated activations.
 *
 * Every intermediate result is rounded to the tensors' type where transformers' modeling code rounds it, so that these
 * differ from it by no more than the order of a float32 sum. The file includes itself once for each type. */
#ifndef TYPE
#include <math.h>
#include <stdint.h>
#include <string.h>

#include "call.h"

#define INLINE static inline __attribute__((always_inline))
enum { PARALLEL_FROM = 65536 }; /* elements; for fewer, waking the other threads costs more than they save */

INLINE float float_of_bf16(uint16_t value) {
    uint32_t bits = (uint32_t)value << 16;
    float result;
    memcpy(&result, &bits, sizeof result);
    return result;
}

/* Round to nearest, ties to even, as torch does; NaN stays NaN. */
INLINE uint16_t bf16_of_float(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    uint16_t rounded = (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
    return value != value ? 0x7fc0 : rounded;
}

/* e^x within an ulp or two; the products are fused by hand so that none is reordered. */
INLINE float exponential(float x) {
    x = x > 88.0f ? 88.0f : x < -87.0f ? -87.0f : x;
    float n = __builtin_rintf(x * 1.44269504f);
    float f = __builtin_fmaf(n, 2.12194440e-4f, __builtin_fmaf(n, -0.693359375f, x));
    float sum = 1.98412698e-4f;
    sum = __builtin_fmaf(sum, f, 1.38888889e-3f);
    sum = __builtin_fmaf(sum, f, 8.33333333e-3f);
    sum = __builtin_fmaf(sum, f, 4.16666667e-2f);
    sum = __builtin_fmaf(sum, f, 1.66666667e-1f);
    sum = __builtin_fmaf(sum, f, 0.5f);
    sum = __builtin_fmaf(sum, f, 1.0f);
    sum = __builtin_fmaf(sum, f, 1.0f);
    int32_t bits = ((int32_t)n + 127) << 23;
    float power;
    memcpy(&power, &bits, sizeof power);
    return sum * power;
}

INLINE float silu(float x) { return x / (1.0f + exponential(-x)); }

/* 0.5 x (1 + tanh(u)) is x / (1 + e^-2u). */
INLINE float gelu_tanh(float x) { return x / (1.0f + exponential(-1.5957691216f * (x + 0.044715f * x * x * x))); }

/* Rows of a table, `bytes` each, to where they lie one after another. */
void take_rows(char *to, const char *table, const int64_t *rows, int64_t count, int64_t bytes) {
    for (int64_t i = 0; i < count; i++) memcpy(to + i * bytes, table + rows[i] * bytes, bytes);
}

CALL(take_rows, ADDRESS(0), ADDRESS(1), ADDRESS(2), NUMBER(3), NUMBER(4))

/* Of `members` tables pairs[rows][2], as `best_of_rows` makes them: for each row the column of the greatest value, the
 * lowest of equals; NaN is the greatest. */
void best_of_members(int64_t *columns, const double *pairs, int64_t members, int64_t rows) {
    for (int64_t row = 0; row < rows; row++) {
        const double *best = pairs + 2 * row;
        for (int64_t member = 1; member < members; member++) {
            const double *other = pairs + 2 * (member * rows + row);
            const int less = other[0] < best[0] || best[0] != best[0];
            if (!less && (other[0] != best[0] || other[1] < best[1])) best = other;
        }
        columns[row] = (int64_t)best[1];
    }
}

CALL(best_of_members, ADDRESS(0), ADDRESS(1), NUMBER(2), NUMBER(3))

/* Whole numbers in the order of floating-point ones, both zeros alike; NaN is the greatest, as torch has it. */
INLINE int32_t order_of_bf16(uint16_t bits) {
    int16_t key = (int16_t)(bits ^ (((int16_t)bits >> 15) & 0x7fff));
    return key + (key == -1);
}
INLINE int32_t order_of_f32(float value) {
    int32_t bits;
    memcpy(&bits, &value, sizeof bits);
    int32_t key = bits ^ ((bits >> 31) & 0x7fffffff);
    return key + (key == -1);
}

#define TYPE uint16_t
#define NAMED(name) name##_bf16
#define READ(value) float_of_bf16(value)
#define ROUND(value) bf16_of_float(value)
#include "elementwise.c"
#undef TYPE
#undef NAMED
#undef READ
#undef ROUND
#define TYPE float
#define NAMED(name) name##_f32
#define READ(value) (value)
#define ROUND(value) (value)
#include "elementwise.c"

#else /* TYPE */

INLINE void NAMED(norm_row)(TYPE *normed, const TYPE *x, const TYPE *weight, int64_t width, float eps) {
    float squares = 0.0f;
    for (int64_t i = 0; i < width; i++) squares += READ(x[i]) * READ(x[i]);
    float scale = 1.0f / sqrtf(squares / (float)width + eps);
    for (int64_t i = 0; i < width; i++) {
        TYPE unit = ROUND(READ(x[i]) * scale);
        normed[i] = ROUND(READ(weight[i]) * READ(unit));
    }
}

/* normed, x: [rows, width]; weight: [width]. */
void NAMED(rms_norm)(TYPE *normed, const TYPE *x, const TYPE *weight, int64_t rows, int64_t width, float eps) {
#pragma omp parallel for schedule(static) if (rows * width > PARALLEL_FROM)
    for (int64_t row = 0; row < rows; row++)
        NAMED(norm_row)(normed + row * width, x + row * width, weight, width, eps);
}

/* residual += x, and the norm of that. normed, residual, x: [rows, width]; weight: [width]. */
void NAMED(add_rms_norm)(
    TYPE *normed, TYPE *residual, const TYPE *x, const TYPE *weight, int64_t rows, int64_t width, float eps) {
#pragma omp parallel for schedule(static) if (rows * width > PARALLEL_FROM)
    for (int64_t row = 0; row < rows; row++) {
        TYPE *sum = residual + row * width;
        const TYPE *more = x + row * width;
        for (int64_t i = 0; i < width; i++) sum[i] = ROUND(READ(sum[i]) + READ(more[i]));
        NAMED(norm_row)(normed + row * width, sum, weight, width, eps);
    }
}

INLINE void NAMED(rotate_token)(
    TYPE *x, int64_t heads, int64_t head_width, const TYPE *cosine, const TYPE *sine, int64_t half) {
    for (int64_t head = 0; head < heads; head++, x += head_width)
        for (int64_t i = 0; i < half; i++) {
            float first = READ(x[i]), second = READ(x[i + half]);
            TYPE first_part = ROUND(first * READ(cosine[i])), first_turn = ROUND(-second * READ(sine[i]));
            TYPE second_part = ROUND(second * READ(cosine[i + half])), second_turn = ROUND(first * READ(sine[i + half]));
            x[i] = ROUND(READ(first_part) + READ(first_turn));
            x[i + half] = ROUND(READ(second_part) + READ(second_turn));
        }
}

/* The first 2 * half values of every head of q and k, in place. Heads lie `head_width` apart, tokens as far as their
 * strides say; cosine, sine: [rows, 2 * half]. */
void NAMED(rotate)(
    TYPE *q, int64_t q_stride, int64_t q_heads, TYPE *k, int64_t k_stride, int64_t k_heads, int64_t head_width,
    const TYPE *cosine, const TYPE *sine, int64_t rows, int64_t half) {
#pragma omp parallel for schedule(static) if (rows * (q_heads + k_heads) * half > PARALLEL_FROM)
    for (int64_t row = 0; row < rows; row++) {
        const TYPE *c = cosine + row * 2 * half, *s = sine + row * 2 * half;
        NAMED(rotate_token)(q + row * q_stride, q_heads, head_width, c, s, half);
        NAMED(rotate_token)(k + row * k_stride, k_heads, head_width, c, s, half);
    }
}

/* gate, up: rows of `width` that lie `gate_stride`, `up_stride` apart; out: [rows, width]. */
#define GATED(NAME, ACTIVATION)                                                                                  \
    INLINE void NAMED(NAME##_row)(TYPE * out, const TYPE *gate, const TYPE *up, int64_t width) {                 \
        for (int64_t i = 0; i < width; i++) {                                                                    \
            TYPE active = ROUND(ACTIVATION(READ(gate[i])));                                                      \
            out[i] = ROUND(READ(active) * READ(up[i]));                                                          \
        }                                                                                                        \
    }                                                                                                            \
    void NAMED(NAME)(                                                                                            \
        TYPE * out, const TYPE *gate, int64_t gate_stride, const TYPE *up, int64_t up_stride, int64_t rows,      \
        int64_t width) {                                                                                         \
        _Pragma("omp parallel for schedule(static) if (rows * width > PARALLEL_FROM)")                                 \
        for (int64_t row = 0; row < rows; row++)                                                                 \
            NAMED(NAME##_row)(out + row * width, gate + row * gate_stride, up + row * up_stride, width);         \
    }

GATED(silu_mul, silu)
GATED(gelu_tanh_mul, gelu_tanh)
#undef GATED

/* Cosine and sine of every position times every frequency, times `scaling`: [rows, 2 * half], the halves alike. */
void NAMED(rotary_angles)(
    TYPE *cosine, TYPE *sine, const int64_t *positions, const float *frequencies, int64_t rows, int64_t half,
    float scaling) {
#pragma omp parallel for schedule(static) if (rows * half > PARALLEL_FROM / 16)
    for (int64_t row = 0; row < rows; row++) {
        TYPE *c = cosine + row * 2 * half, *s = sine + row * 2 * half;
        for (int64_t i = 0; i < half; i++) {
            float angle = (float)positions[row] * frequencies[i];
            c[i] = c[i + half] = ROUND(cosf(angle) * scaling);
            s[i] = s[i + half] = ROUND(sinf(angle) * scaling);
        }
    }
}

/* The greatest of each row and its column counted from `first`, the lowest of equals: pairs[rows][2]. */
void NAMED(best_of_rows)(double *pairs, const TYPE *x, int64_t rows, int64_t width, int64_t stride, int64_t first) {
#pragma omp parallel for schedule(static) if (rows * width > PARALLEL_FROM)
    for (int64_t row = 0; row < rows; row++) {
        const TYPE *values = x + row * stride;
        int32_t most = INT32_MIN;
        for (int64_t i = 0; i < width; i++) {
            int32_t key = NAMED(order_of)(values[i]);
            most = key > most ? key : most;
        }
        int64_t place = 0;
        while (NAMED(order_of)(values[place]) != most) place++;
        pairs[2 * row] = READ(values[place]);
        pairs[2 * row + 1] = (double)(first + place);
    }
}

CALL(
    NAMED(rotary_angles), ADDRESS(0), ADDRESS(1), ADDRESS(2), ADDRESS(3), NUMBER(4), NUMBER(5), FLOAT(6))
CALL(NAMED(best_of_rows), ADDRESS(0), ADDRESS(1), NUMBER(2), NUMBER(3), NUMBER(4), NUMBER(5))
CALL(NAMED(rms_norm), ADDRESS(0), ADDRESS(1), ADDRESS(2), NUMBER(3), NUMBER(4), FLOAT(5))
CALL(NAMED(add_rms_norm), ADDRESS(0), ADDRESS(1), ADDRESS(2), ADDRESS(3), NUMBER(4), NUMBER(5), FLOAT(6))
CALL(
    NAMED(rotate), ADDRESS(0), NUMBER(1), NUMBER(2), ADDRESS(3), NUMBER(4), NUMBER(5), NUMBER(6), ADDRESS(7),
    ADDRESS(8), NUMBER(9), NUMBER(10))
CALL(NAMED(silu_mul), ADDRESS(0), ADDRESS(1), NUMBER(2), ADDRESS(3), NUMBER(4), NUMBER(5), NUMBER(6))
CALL(NAMED(gelu_tanh_mul), ADDRESS(0), ADDRESS(1), NUMBER(2), ADDRESS(3), NUMBER(4), NUMBER(5), NUMBER(6))

#endif /* TYPE */
