/* Arguments of layers with a delta rule (delta_net.c). */
#pragma once
#include <stdint.h>

#include "short_convolution.h"

/* Groups of projections are key heads; their heads are the value heads of one key head. */
struct delta_net {
    struct fed q, k, v, z, b, a;
    struct convolution conv; /* over all of q, k, v */
    int64_t sequences, length; /* of each sequence: tokens */
    int64_t key_heads, value_heads, key_width, value_width;
    const void *decay; /* A_log: [value_heads] */
    const void *decay_bias; /* dt_bias: [value_heads], or per channel of the keys */
    const void *norm;       /* [value_width] */
    float *states;          /* [slots][value_heads, key_width, value_width], `stride` apart */
    int64_t stride;
    const int64_t *slots; /* [sequences] */
    float *scratch;       /* floats_of_delta_net */
    void *out;            /* [sequences * length, value_heads * value_width] */
    /* Kimi delta attention: a decay per channel of the keys, at least e^lower_bound if that is not 0. */
    int64_t is_per_channel, rounds_decays;
    int64_t has_float32_decay, has_float32_bias; /* whatever the type of the inputs */
    float epsilon, lower_bound, strength; /* strength: of a write whose gate is open */
};
