/* Short causal convolutions, one filter per channel, over the last inputs of a sequence and its new ones. */
#pragma once
#include "sigmoid.h"
#include "vector.h"

enum { MOST_TAPS = 8 };

/* A projection's output. Tokens are `row` elements apart, the heads of one group `head`, groups `group`. */
struct fed {
    const void *data;
    int64_t row, group, head;
};

/* Its heads, `each` per group, which are `width` channels each, from channel `first` on. */
struct channels {
    int64_t first, heads, each, width;
};

struct convolution {
    const void *weight, *bias; /* [channels, taps], [channels] or NULL */
    void *states;              /* [slots][channels, taps]: the last inputs; slots `stride` elements apart */
    int64_t stride, channels, taps;
    int64_t is_float32; /* the weight and the bias, whatever the type of the inputs */
};

INLINE const void *element(const void *data, int64_t index, enum type type) {
    return (const char *)data + index * (int64_t)size_of(type);
}

INLINE float number(const void *data, int64_t index, enum type type) {
    return type == FLOAT32 ? ((const float *)data)[index] : float_of(((const bfloat16 *)data)[index]);
}

INLINE float rounded_number(float x, enum type type) { return type == FLOAT32 ? x : float_of(bfloat16_of(x)); }

INLINE void copy_number(void *to, int64_t index, const void *from, int64_t other, enum type type) {
    memcpy((char *)to + index * (int64_t)size_of(type), element(from, other, type), size_of(type));
}

/* An element, or LANES of them, of weights that are float32 or of the type of the inputs. */
INLINE float weight_number(const void *data, int64_t index, int64_t is_float32, enum type type) {
    return is_float32 ? number(data, index, FLOAT32) : number(data, index, type);
}

INLINE floats take_weights(const void *data, int64_t index, int64_t is_float32, enum type type) {
    return is_float32 ? take(element(data, index, FLOAT32), FLOAT32) : take(element(data, index, type), type);
}

/* Where `head` of `token` starts. */
INLINE const void *head_of(const struct fed *fed, int64_t token, int64_t head, int64_t each, enum type type) {
    return element(fed->data, token * fed->row + head / each * fed->group + head % each * fed->head, type);
}

/* Floats of the weight by taps, with the bias as the last row, [taps + 1, channels]. */
INLINE int64_t weight_floats(const struct convolution *conv) { return (conv->taps + 1) * conv->channels; }

/* Floats of the last inputs by taps, [taps, channels], of the type of the inputs. */
INLINE int64_t past_floats(const struct convolution *conv) { return conv->taps * conv->channels; }

INLINE void weight_by_taps(const struct convolution *conv, float *weight, enum type type) {
    for (int64_t channel = 0; channel < conv->channels; channel++)
        for (int64_t i = 0; i < conv->taps; i++)
            weight[i * conv->channels + channel] =
                weight_number(conv->weight, channel * conv->taps + i, conv->is_float32, type);
    for (int64_t channel = 0; channel < conv->channels; channel++)
        weight[conv->taps * conv->channels + channel] =
            conv->bias ? weight_number(conv->bias, channel, conv->is_float32, type) : 0.0f;
}

INLINE void *state_of(const struct convolution *conv, int64_t slot, enum type type) {
    return (char *)conv->states + slot * conv->stride * (int64_t)size_of(type);
}

/* The last inputs of a sequence, as rows of channels. */
INLINE void recall(const struct convolution *conv, int64_t slot, void *past, enum type type) {
    const void *state = state_of(conv, slot, type);
    for (int64_t channel = 0; channel < conv->channels; channel++)
        for (int64_t i = 0; i < conv->taps; i++)
            copy_number(past, i * conv->channels + channel, state, channel * conv->taps + i, type);
}

/* Store the last inputs after the tokens start .. start + length - 1. */
INLINE void remember(
    const struct convolution *conv, int64_t slot, const void *past, const struct fed *fed, struct channels own,
    int64_t start, int64_t length, enum type type) {
    void *state = state_of(conv, slot, type);
    for (int64_t i = 0; i < conv->taps; i++) {
        const int64_t token = length - conv->taps + i;
        for (int64_t head = 0; head < own.heads; head++) {
            const int64_t first = own.first + head * own.width;
            const void *from = token < 0 ? element(past, (conv->taps + token) * conv->channels + first, type)
                                         : head_of(fed, start + token, head, own.each, type);
            for (int64_t c = 0; c < own.width; c++) copy_number(state, (first + c) * conv->taps + i, from, c, type);
        }
    }
}

INLINE void convolve_vectors(
    const struct convolution *conv, const void **rows, int64_t at, int64_t channel, const float *weight, float *out,
    const int activated, const int n, enum type type) {
    floats sum[TOGETHER];
#define EACH UNROLL for (int v = 0; v < n; v++)
    EACH sum[v] = take(weight + conv->taps * conv->channels + channel + v * LANES, FLOAT32);
    for (int64_t i = 0; i < conv->taps; i++)
        EACH sum[v] += take(element(rows[i], at + v * LANES, type), type) *
                       take(weight + i * conv->channels + channel + v * LANES, FLOAT32);
    if (!conv->is_float32) EACH sum[v] = rounded(sum[v], type);
    if (activated) silu(sum, n, type);
    EACH give(out + channel + v * LANES, rounded(sum[v], type), FLOAT32);
#undef EACH
}

/* Token start + t, with SiLU if `activated`: out[channels]. Widths are multiples of LANES; weight: by taps. */
INLINE void convolve(
    const struct convolution *conv, const float *weight, const void *past, const struct fed *fed, struct channels own,
    int64_t start, int64_t t, float *out, const int activated, enum type type) {
    for (int64_t head = 0; head < own.heads; head++) {
        const int64_t first = own.first + head * own.width;
        const void *rows[MOST_TAPS];
        for (int64_t i = 0; i < conv->taps; i++) {
            const int64_t token = t - conv->taps + 1 + i;
            rows[i] = token < 0 ? element(past, (conv->taps + token) * conv->channels + first, type)
                                : head_of(fed, start + token, head, own.each, type);
        }
        int64_t at = 0;
        for (; at + TOGETHER * LANES <= own.width; at += TOGETHER * LANES)
            convolve_vectors(conv, rows, at, first + at, weight, out, activated, TOGETHER, type);
        for (; at < own.width; at += LANES) convolve_vectors(conv, rows, at, first + at, weight, out, activated, 1, type);
    }
}
