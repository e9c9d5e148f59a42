/* Elementwise operations of a decoder layer: norms, rotary positions, gated activations.
 *
 * Intermediate results are rounded where transformers' modeling code rounds them, so that results differ only by the
 * order of float32 sums. The file includes itself once per type. */
#ifndef TYPE
#include <math.h>
#include <stdint.h>
#include <string.h>

#include "call.h"
#include "sigmoid.h"
#include "vector.h"

/* Elements: for fewer, starting threads costs more than it saves. */
enum { PARALLEL_FROM = 65536, NORMS_FROM = 16384, GATES_FROM = 8192 };

/* Run the statement for every vector of a row of `width` elements: it begins at `i` and has `count` elements. */
#define EACH_VECTOR(width, ...)                                                                                  \
    do {                                                                                                         \
        int64_t i = 0;                                                                                           \
        for (; i + LANES <= (width); i += LANES) {                                                               \
            const int count = LANES;                                                                             \
            __VA_ARGS__;                                                                                         \
        }                                                                                                        \
        if (i < (width)) {                                                                                       \
            const int count = (int)((width) - i);                                                                \
            __VA_ARGS__;                                                                                         \
        }                                                                                                        \
    } while (0)

/* 0.5 x (1 + tanh(u)) is x / (1 + e^-2u). */
INLINE void gelu_tanh(floats *x, const int n, enum type type) {
    floats z[TOGETHER];
    UNROLL for (int v = 0; v < n; v++) z[v] = 1.5957691216f * (x[v] + 0.044715f * x[v] * x[v] * x[v]);
    times_sigmoid(x, z, n, type);
}

/* Gather rows of a table, `bytes` each, contiguously. */
void take_rows(char *to, const char *table, const int64_t *rows, int64_t count, int64_t bytes) {
    for (int64_t i = 0; i < count; i++) memcpy(to + i * bytes, table + rows[i] * bytes, bytes);
}

CALL(take_rows, ADDRESS(0), ADDRESS(1), ADDRESS(2), NUMBER(3), NUMBER(4))

/* The heads `order` of each token, `bytes` each, contiguously. token_bytes, head_bytes: from one to the next in `from`. */
void take_heads(char *to, const char *from, const int64_t *order, int64_t tokens, int64_t heads, int64_t bytes,
                int64_t token_bytes, int64_t head_bytes) {
    for (int64_t token = 0; token < tokens; token++, from += token_bytes)
        for (int64_t i = 0; i < heads; i++, to += bytes) memcpy(to, from + order[i] * head_bytes, bytes);
}

CALL(take_heads, ADDRESS(0), ADDRESS(1), ADDRESS(2), NUMBER(3), NUMBER(4), NUMBER(5), NUMBER(6), NUMBER(7))

/* Of `members` tables pairs[rows][2], as `best_of_rows` makes them: the argmax of each row, the lowest
 * column of equals; NaN is the greatest. */
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

/* Integers that sort like the floats; both zeros are equal, and NaN is the greatest, as in torch. */
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

#define TYPE bfloat16
#define KIND BFLOAT16
#define NAMED(name) name##_bf16
#define READ(value) float_of(value)
#define ROUND(value) bfloat16_of(value)
#include "elementwise.c"
#undef TYPE
#undef KIND
#undef NAMED
#undef READ
#undef ROUND
#define TYPE float
#define KIND FLOAT32
#define NAMED(name) name##_f32
#define READ(value) (value)
#define ROUND(value) (value)
#include "elementwise.c"

#else /* TYPE */

/* x divided by the root of its mean square, times weight; `squares` is the sum of the squares of x. With an offset, the
 * weight is added to it, and the product is rounded only once. */
INLINE void NAMED(norm_row)(
    TYPE *normed, const TYPE *x, const TYPE *weight, int64_t width, floats squares, float eps, float offset) {
    const float scale = 1.0f / sqrtf(sum_of_lanes(squares) / (float)width + eps);
    if (offset != 0.0f) {
        EACH_VECTOR(width, {
            floats unit = take_some(x + i, count, KIND) * scale;
            give_some(normed + i, (take_some(weight + i, count, KIND) + offset) * unit, count, KIND);
        });
        return;
    }
    EACH_VECTOR(width, {
        floats unit = rounded(take_some(x + i, count, KIND) * scale, KIND);
        give_some(normed + i, take_some(weight + i, count, KIND) * unit, count, KIND);
    });
}

/* normed, x: [rows, width]; weight: [width]. */
void NAMED(rms_norm)(TYPE *normed, const TYPE *x, const TYPE *weight, int64_t rows, int64_t width, float eps, float offset) {
#pragma omp parallel for schedule(static) if (rows * width > NORMS_FROM)
    for (int64_t row = 0; row < rows; row++) {
        const TYPE *own = x + row * width;
        floats squares = {0};
        EACH_VECTOR(width, {
            floats value = take_some(own + i, count, KIND);
            squares += value * value;
        });
        NAMED(norm_row)(normed + row * width, own, weight, width, squares, eps, offset);
    }
}

/* residual += x, then its norm. normed, residual, x: [rows, width]; weight: [width]. */
void NAMED(add_rms_norm)(
    TYPE *normed, TYPE *residual, const TYPE *x, const TYPE *weight, int64_t rows, int64_t width, float eps,
    float offset) {
#pragma omp parallel for schedule(static) if (rows * width > NORMS_FROM)
    for (int64_t row = 0; row < rows; row++) {
        TYPE *sum = residual + row * width;
        const TYPE *more = x + row * width;
        floats squares = {0};
        EACH_VECTOR(width, {
            floats value = rounded(take_some(sum + i, count, KIND) + take_some(more + i, count, KIND), KIND);
            give_some(sum + i, value, count, KIND);
            squares += value * value;
        });
        NAMED(norm_row)(normed + row * width, sum, weight, width, squares, eps, offset);
    }
}

INLINE void NAMED(rotate_token)(
    TYPE *x, int64_t heads, int64_t head_width, const TYPE *cosine, const TYPE *sine, int64_t half) {
    for (int64_t head = 0; head < heads; head++, x += head_width)
        EACH_VECTOR(half, {
            floats first = take_some(x + i, count, KIND), second = take_some(x + half + i, count, KIND);
            floats first_part = rounded(first * take_some(cosine + i, count, KIND), KIND);
            floats first_turn = rounded(second * take_some(sine + i, count, KIND), KIND);
            floats second_part = rounded(second * take_some(cosine + half + i, count, KIND), KIND);
            floats second_turn = rounded(first * take_some(sine + half + i, count, KIND), KIND);
            give_some(x + i, first_part - first_turn, count, KIND);
            give_some(x + half + i, second_part + second_turn, count, KIND);
        });
}

/* Rotate the first 2 * half values of every head of q and k in place. Heads are `head_width` apart, tokens by their
 * strides; cosine, sine: [rows, 2 * half]. */
void NAMED(rotate)(
    TYPE *q, int64_t q_stride, int64_t q_heads, TYPE *k, int64_t k_stride, int64_t k_heads, int64_t head_width,
    const TYPE *cosine, const TYPE *sine, int64_t rows, int64_t half) {
#pragma omp parallel for schedule(static) if (rows * (q_heads + k_heads) * half > NORMS_FROM)
    for (int64_t row = 0; row < rows; row++) {
        const TYPE *c = cosine + row * 2 * half, *s = sine + row * 2 * half;
        NAMED(rotate_token)(q + row * q_stride, q_heads, head_width, c, s, half);
        NAMED(rotate_token)(k + row * k_stride, k_heads, head_width, c, s, half);
    }
}

/* gate, up: rows of `width` that lie `gate_stride`, `up_stride` apart; out: [rows, width]. */
#define GATED(NAME, ACTIVATION)                                                                                  \
    INLINE void NAMED(NAME##_some)(TYPE * out, const TYPE *gate, const TYPE *up, const int n, const int count) { \
        floats x[TOGETHER];                                                                                      \
        UNROLL for (int v = 0; v < n; v++) x[v] = take_some(gate + v * LANES, count, KIND);                      \
        ACTIVATION(x, n, KIND);                                                                                  \
        UNROLL for (int v = 0; v < n; v++) {                                                                     \
            floats product = rounded(x[v], KIND) * take_some(up + v * LANES, count, KIND);                       \
            give_some(out + v * LANES, product, count, KIND);                                                    \
        }                                                                                                        \
    }                                                                                                            \
    INLINE void NAMED(NAME##_row)(TYPE * out, const TYPE *gate, const TYPE *up, int64_t width) {                 \
        const int64_t together = TOGETHER * LANES, whole = width - width % together;                             \
        for (int64_t i = 0; i < whole; i += together)                                                            \
            NAMED(NAME##_some)(out + i, gate + i, up + i, TOGETHER, LANES);                                      \
        out += whole, gate += whole, up += whole;                                                                \
        EACH_VECTOR(width - whole, NAMED(NAME##_some)(out + i, gate + i, up + i, 1, count));                     \
    }                                                                                                            \
    void NAMED(NAME)(                                                                                            \
        TYPE * out, const TYPE *gate, int64_t gate_stride, const TYPE *up, int64_t up_stride, int64_t rows,      \
        int64_t width) {                                                                                         \
        _Pragma("omp parallel for schedule(static) if (rows * width > GATES_FROM)")                              \
        for (int64_t row = 0; row < rows; row++)                                                                 \
            NAMED(NAME##_row)(out + row * width, gate + row * gate_stride, up + row * up_stride, width);         \
    }
GATED(silu_mul, silu)
GATED(gelu_tanh_mul, gelu_tanh)
#undef GATED

/* Cosine and sine of every position times every frequency, times `scaling`: [rows, 2 * half], with equal halves. */
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

/* Maximum of each row and its column plus `first`, the lowest of equals: pairs[rows][2]. */
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
CALL(NAMED(rms_norm), ADDRESS(0), ADDRESS(1), ADDRESS(2), NUMBER(3), NUMBER(4), FLOAT(5), FLOAT(6))
CALL(
    NAMED(add_rms_norm), ADDRESS(0), ADDRESS(1), ADDRESS(2), ADDRESS(3), NUMBER(4), NUMBER(5), FLOAT(6), FLOAT(7))
CALL(
    NAMED(rotate), ADDRESS(0), NUMBER(1), NUMBER(2), ADDRESS(3), NUMBER(4), NUMBER(5), NUMBER(6), ADDRESS(7),
    ADDRESS(8), NUMBER(9), NUMBER(10))
CALL(NAMED(silu_mul), ADDRESS(0), ADDRESS(1), NUMBER(2), ADDRESS(3), NUMBER(4), NUMBER(5), NUMBER(6))
CALL(NAMED(gelu_tanh_mul), ADDRESS(0), ADDRESS(1), NUMBER(2), ADDRESS(3), NUMBER(4), NUMBER(5), NUMBER(6))

#endif /* TYPE */
