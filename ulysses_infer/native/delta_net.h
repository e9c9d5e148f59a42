/* Arguments of the gated delta net (delta_net.c). */
#pragma once
#include <stdint.h>

/* A projection's output. Tokens are `row` elements apart, the value heads of one key head `head`, key heads `group`. */
struct fed {
    const void *data;
    int64_t row, group, head;
};

struct delta_net {
    struct fed q, k, v, z, b, a;
    int64_t sequences, length; /* of each sequence: tokens */
    int64_t key_heads, value_heads, key_width, value_width, kernel;
    const void *conv_weight, *conv_bias; /* [channels, kernel], [channels] or NULL; channels: all of q, k, v */
    const void *decay, *decay_bias;      /* A_log, dt_bias: [value_heads] */
    const void *norm;                    /* [value_width] */
    void *conv_states;                   /* [slots][channels, kernel], slots `conv_stride` elements apart */
    float *states;                       /* [slots][value_heads, key_width, value_width], `stride` apart */
    int64_t conv_stride, stride;
    const int64_t *slots; /* [sequences] */
    float *scratch;       /* floats_of_delta_net */
    void *out;            /* [sequences * length, value_heads * value_width] */
    float epsilon;
};
