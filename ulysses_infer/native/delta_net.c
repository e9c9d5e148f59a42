/* Gated delta net: short convolution, delta rule, gated norm, for own heads of all tokens of some sequences.
 *
 * The delta rule (Yang et al., "Gated Delta Networks", ICLR 2025) goes token by token over a block of the state's
 * columns that stays in the first-level cache. For the usual widths this needs fewer operations than the chunked form.
 * Results are rounded where transformers rounds. The file includes itself once per type. */
#ifndef TYPE
#include <math.h>
#include <stdint.h>
#include <string.h>

#include "call.h"
#include "delta_net.h"
#include "sigmoid.h"
#include "vector.h"

enum { COLUMNS = 4 }; /* vectors of a block */

/* Own channels, in the order q, k, v. */
static int64_t channels_of(const struct delta_net *net) {
    return 2 * net->key_heads * net->key_width + net->value_heads * net->value_width;
}

/* Per sequence: the convolution's inputs [kernel + length, channels] and results [length, channels], decay and write
 * strength [2, value_heads, length], the output before its norm [length, value_heads, value_width]. Once: the
 * convolution's weight [kernel, channels]. */
static int64_t sequence_floats(const struct delta_net *net) {
    const int64_t channels = channels_of(net);
    return (net->kernel + 2 * net->length) * channels + 2 * net->value_heads * net->length +
           net->length * net->value_heads * net->value_width;
}

int64_t floats_of_delta_net(const struct delta_net *net) {
    return net->sequences * sequence_floats(net) + net->kernel * channels_of(net);
}

/* x / |x| * scale, in place. */
INLINE void normalise(float *x, int64_t width, float scale) {
    floats squares = {0};
    for (int64_t i = 0; i < width; i += LANES) {
        floats value = take(x + i, FLOAT32);
        squares += value * value;
    }
    const float factor = scale / sqrtf(sum_of_lanes(squares) + 1e-6f);
    for (int64_t i = 0; i < width; i += LANES) give(x + i, take(x + i, FLOAT32) * factor, FLOAT32);
}

/* The delta rule for `n` vectors of columns of one head. q, k: rows `channels` apart; v: the same, at the block's first
 * column; state: [key_width, value_width], at that column; out: rows `out_row` apart. */
INLINE void delta_rule(
    float *state, const float *q, const float *k, const float *v, const float *decay, const float *strength, float *out,
    int64_t length, int64_t channels, int64_t key_width, int64_t value_width, int64_t out_row, const int n) {
    floats found[COLUMNS]; /* what the decayed state holds for the next key */
#define EACH UNROLL for (int c = 0; c < n; c++)
    EACH found[c] = splat(0.0f);
    for (int64_t i = 0; i < key_width; i++)
        EACH found[c] += take(state + i * value_width + c * LANES, FLOAT32) * k[i];
    for (int64_t t = 0; t < length; t++) {
        const float *query = q + t * channels, *key = k + t * channels, *following = t + 1 < length ? key + channels : key;
        floats delta[COLUMNS], sum[COLUMNS], next[COLUMNS];
        EACH delta[c] = (take(v + t * channels + c * LANES, FLOAT32) - found[c] * decay[t]) * strength[t];
        EACH sum[c] = next[c] = splat(0.0f);
        for (int64_t i = 0; i < key_width; i++) {
            float *row = state + i * value_width;
            floats now[COLUMNS];
            EACH now[c] = take(row + c * LANES, FLOAT32) * decay[t] + delta[c] * key[i];
            EACH give(row + c * LANES, now[c], FLOAT32);
            EACH sum[c] += now[c] * query[i];
            EACH next[c] += now[c] * following[i];
        }
        EACH give(out + t * out_row + c * LANES, sum[c], FLOAT32);
        EACH found[c] = next[c];
    }
#undef EACH
}

static float softplus(float x) { return x > 20.0f ? x : log1pf(expf(x)); }

#define TYPE bfloat16
#define KIND BFLOAT16
#define NAMED(name) name##_bf16
#define READ(value) float_of(value)
#define ROUND(value) bfloat16_of(value)
#include "delta_net.c"
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
#include "delta_net.c"

#else /* TYPE */

/* `width` elements of each of `heads` heads of one token, to float32. `each`: heads per group. */
INLINE float *NAMED(gather)(float *to, const struct fed *from, int64_t token, int64_t heads, int64_t each, int64_t width) {
    for (int64_t head = 0; head < heads; head++, to += width) {
        const TYPE *own =
            (const TYPE *)from->data + token * from->row + head / each * from->group + head % each * from->head;
        for (int64_t i = 0; i < width; i += LANES) give(to + i, take(own + i, KIND), FLOAT32);
    }
    return to;
}

/* The last inputs of the convolution and the new ones, as rows of all channels: window[kernel + length][channels]. */
INLINE void NAMED(fill_window)(const struct delta_net *net, float *window, int64_t sequence) {
    const int64_t channels = channels_of(net), kernel = net->kernel, each = net->value_heads / net->key_heads;
    TYPE *past = (TYPE *)net->conv_states + net->slots[sequence] * net->conv_stride;
    for (int64_t channel = 0; channel < channels; channel++)
        for (int64_t i = 0; i < kernel; i++) window[i * channels + channel] = READ(past[channel * kernel + i]);
    for (int64_t t = 0; t < net->length; t++) {
        const int64_t token = sequence * net->length + t;
        float *row = window + (kernel + t) * channels;
        row = NAMED(gather)(row, &net->q, token, net->key_heads, 1, net->key_width);
        row = NAMED(gather)(row, &net->k, token, net->key_heads, 1, net->key_width);
        NAMED(gather)(row, &net->v, token, net->value_heads, each, net->value_width);
    }
    const float *last = window + net->length * channels;
    for (int64_t channel = 0; channel < channels; channel++)
        for (int64_t i = 0; i < kernel; i++) past[channel * kernel + i] = ROUND(last[i * channels + channel]);
}

/* The convolution and its activation: mixed[length][channels]. weight: [kernel][channels]. */
INLINE void NAMED(convolve)(const struct delta_net *net, float *mixed, const float *window, const float *weight) {
    const int64_t channels = channels_of(net), kernel = net->kernel;
    const TYPE *bias = net->conv_bias;
    for (int64_t t = 0; t < net->length; t++)
        for (int64_t channel = 0; channel < channels; channel += LANES) {
            floats sum = bias ? take(bias + channel, KIND) : splat(0.0f);
            for (int64_t i = 0; i < kernel; i++)
                sum += take(window + (t + 1 + i) * channels + channel, FLOAT32) *
                       take(weight + i * channels + channel, FLOAT32);
            sum = rounded(sum, KIND);
            silu(&sum, 1, KIND);
            give(mixed + t * channels + channel, rounded(sum, KIND), FLOAT32);
        }
}

/* Decay of the state and strength of each write, of every head and token: [value_heads][length] each. */
INLINE void NAMED(gate)(const struct delta_net *net, float *decay, float *strength, int64_t sequence) {
    const int64_t each = net->value_heads / net->key_heads;
    for (int64_t head = 0; head < net->value_heads; head++) {
        const float rate = expf(READ(((const TYPE *)net->decay)[head])), bias = READ(((const TYPE *)net->decay_bias)[head]);
        const int64_t a = head / each * net->a.group + head % each * net->a.head;
        const int64_t b = head / each * net->b.group + head % each * net->b.head;
        for (int64_t t = 0; t < net->length; t++) {
            const int64_t token = sequence * net->length + t, at = head * net->length + t;
            decay[at] = expf(-rate * softplus(READ(((const TYPE *)net->a.data)[token * net->a.row + a]) + bias));
            strength[at] =
                READ(ROUND(1.0f / (1.0f + expf(-READ(((const TYPE *)net->b.data)[token * net->b.row + b])))));
        }
    }
}

/* The norm of each head's output, gated by z. output: [length, value_heads, value_width]. */
INLINE void NAMED(gated_norm)(const struct delta_net *net, const float *output, int64_t sequence) {
    const int64_t width = net->value_width, each = net->value_heads / net->key_heads;
    const TYPE *weight = net->norm;
    for (int64_t t = 0; t < net->length; t++)
        for (int64_t head = 0; head < net->value_heads; head++, output += width) {
            const int64_t token = sequence * net->length + t;
            const TYPE *gate = (const TYPE *)net->z.data + token * net->z.row + head / each * net->z.group +
                               head % each * net->z.head;
            TYPE *out = (TYPE *)net->out + (token * net->value_heads + head) * width;
            floats squares = {0};
            for (int64_t i = 0; i < width; i += LANES) {
                floats value = rounded(take(output + i, FLOAT32), KIND);
                squares += value * value;
            }
            const float scale = 1.0f / sqrtf(sum_of_lanes(squares) / (float)width + net->epsilon);
            for (int64_t i = 0; i < width; i += LANES) {
                floats unit = rounded(rounded(take(output + i, FLOAT32), KIND) * scale, KIND);
                floats value = rounded(take(weight + i, KIND) * unit, KIND), z = take(gate + i, KIND);
                silu(&z, 1, FLOAT32);
                give(out + i, value * z, KIND);
            }
        }
}

/* One head's delta rule, block by block. */
INLINE void NAMED(run_head)(
    const struct delta_net *net, const float *mixed, const float *decay, const float *strength, float *output,
    int64_t sequence, int64_t head) {
    const int64_t channels = channels_of(net), width = net->value_width, heads = net->value_heads;
    const int64_t key_head = head / (heads / net->key_heads) * net->key_width, keys = net->key_heads * net->key_width;
    const float *q = mixed + key_head, *k = mixed + keys + key_head, *v = mixed + 2 * keys + head * width;
    float *state = net->states + net->slots[sequence] * net->stride + head * net->key_width * width;
    const float *own_decay = decay + head * net->length, *own_strength = strength + head * net->length;
    int64_t column = 0;
    for (; column + COLUMNS * LANES <= width; column += COLUMNS * LANES)
        delta_rule(
            state + column, q, k, v + column, own_decay, own_strength, output + head * width + column, net->length,
            channels, net->key_width, width, heads * width, COLUMNS);
    for (; column < width; column += LANES)
        delta_rule(
            state + column, q, k, v + column, own_decay, own_strength, output + head * width + column, net->length,
            channels, net->key_width, width, heads * width, 1);
}

/* All widths are multiples of LANES. */
void NAMED(delta_net)(const struct delta_net *net) {
    const int64_t channels = channels_of(net), size = sequence_floats(net), length = net->length;
    float *weight = net->scratch + net->sequences * size;
    for (int64_t channel = 0; channel < channels; channel++)
        for (int64_t i = 0; i < net->kernel; i++)
            weight[i * channels + channel] = READ(((const TYPE *)net->conv_weight)[channel * net->kernel + i]);
    const float scale = 1.0f / sqrtf((float)net->key_width);
#pragma omp parallel
    {
#pragma omp for schedule(static)
        for (int64_t sequence = 0; sequence < net->sequences; sequence++) {
            float *window = net->scratch + sequence * size, *mixed = window + (net->kernel + length) * channels;
            float *decay = mixed + length * channels, *strength = decay + net->value_heads * length;
            NAMED(fill_window)(net, window, sequence);
            NAMED(convolve)(net, mixed, window, weight);
            NAMED(gate)(net, decay, strength, sequence);
            for (int64_t t = 0; t < length; t++)
                for (int64_t head = 0; head < 2 * net->key_heads; head++)
                    normalise(
                        mixed + t * channels + head * net->key_width, net->key_width, head < net->key_heads ? scale : 1.0f);
        }
#pragma omp for schedule(static) collapse(2)
        for (int64_t sequence = 0; sequence < net->sequences; sequence++)
            for (int64_t head = 0; head < net->value_heads; head++) {
                float *window = net->scratch + sequence * size, *mixed = window + (net->kernel + length) * channels;
                float *decay = mixed + length * channels, *strength = decay + net->value_heads * length;
                NAMED(run_head)(net, mixed, decay, strength, strength + net->value_heads * length, sequence, head);
            }
#pragma omp for schedule(static)
        for (int64_t sequence = 0; sequence < net->sequences; sequence++) {
            float *window = net->scratch + sequence * size, *mixed = window + (net->kernel + length) * channels;
            NAMED(gated_norm)(net, mixed + length * channels + 2 * net->value_heads * length, sequence);
        }
    }
}

CALL(NAMED(delta_net), ADDRESS(0))

#endif /* TYPE */
