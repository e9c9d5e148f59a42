/* Gated delta nets and Kimi delta attention: short convolution, delta rule, gated norm, for own heads of all tokens of
 * some sequences.
 *
 * The delta rule (Yang et al., "Gated Delta Networks", ICLR 2025; with a decay per channel: Kimi Team, "Kimi Linear",
 * 2025) goes token by token over a block of the state's columns that stays in the first-level cache. For the usual
 * widths this needs fewer operations than the chunked form. Results are rounded where transformers rounds. */
#include "delta_net.h"

#include <math.h>

#include "call.h"
#include "sigmoid.h"
#include "softplus.h"
#include "vector.h"

enum { COLUMNS = 4 }; /* vectors of a block */

static int64_t keys_of(const struct delta_net *net) { return net->key_heads * net->key_width; }

static int64_t values_of(const struct delta_net *net) { return net->value_heads * net->value_width; }

static int64_t decays_of(const struct delta_net *net) {
    return net->is_per_channel ? keys_of(net) : net->value_heads;
}

/* What is kept of one sequence during the call. */
struct work {
    float *past;     /* [taps, channels], of the type of the inputs */
    float *mixed;    /* results of the convolution: [length, channels] */
    float *decay;    /* [length, value_heads], or [length, key_heads, key_width] */
    float *strength; /* of each write: [length, value_heads] */
    float *output;   /* before its norm: [length, value_heads, value_width] */
};

static int64_t sequence_floats(const struct delta_net *net) {
    return past_floats(&net->conv) +
           net->length * (net->conv.channels + decays_of(net) + net->value_heads + values_of(net));
}

int64_t floats_of_delta_net(const struct delta_net *net) {
    return weight_floats(&net->conv) + net->sequences * sequence_floats(net);
}

static struct work work_of(const struct delta_net *net, int64_t sequence) {
    struct work work;
    work.past = net->scratch + weight_floats(&net->conv) + sequence * sequence_floats(net);
    work.mixed = work.past + past_floats(&net->conv);
    work.decay = work.mixed + net->length * net->conv.channels;
    work.strength = work.decay + net->length * decays_of(net);
    work.output = work.strength + net->length * net->value_heads;
    return work;
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

/* Tokens of one head, and the distances between them. */
struct head {
    const float *q, *k, *v, *decay, *strength;
    float *out;
    int64_t length, channels, decays, strengths, outputs, key_width, value_width;
};

/* The delta rule for `n` vectors of the state's columns, from `column` on. state: [key_width, value_width]. */
INLINE void delta_rule(const struct head *head, float *state, int64_t column, const int n, const int per_channel) {
    const float *key = head->k, *decay = head->decay;
    floats found[COLUMNS]; /* what the decayed state holds for the next key */
#define EACH UNROLL for (int c = 0; c < n; c++)
#define DECAY(i) decay[per_channel ? (i) : 0]
    EACH found[c] = splat(0.0f);
    for (int64_t i = 0; i < head->key_width; i++) {
        const float factor = key[i] * DECAY(i);
        EACH found[c] += take(state + i * head->value_width + column + c * LANES, FLOAT32) * factor;
    }
    for (int64_t t = 0; t < head->length; t++) {
        const int64_t ahead = t + 1 < head->length;
        const float *query = head->q + t * head->channels, *next_key = key + ahead * head->channels;
        const float *value = head->v + t * head->channels + column, *next_decay = decay + ahead * head->decays;
        floats delta[COLUMNS], sum[COLUMNS], next[COLUMNS];
        EACH delta[c] = (take(value + c * LANES, FLOAT32) - found[c]) * head->strength[t * head->strengths];
        EACH sum[c] = next[c] = splat(0.0f);
        for (int64_t i = 0; i < head->key_width; i++) {
            float *row = state + i * head->value_width + column;
            const float factor = per_channel ? next_key[i] * next_decay[i] : next_key[i];
            floats now[COLUMNS];
            EACH now[c] = take(row + c * LANES, FLOAT32) * DECAY(i) + delta[c] * key[i];
            EACH give(row + c * LANES, now[c], FLOAT32);
            EACH sum[c] += now[c] * query[i];
            EACH next[c] += now[c] * factor;
        }
        EACH give(head->out + t * head->outputs + column + c * LANES, sum[c], FLOAT32);
        EACH found[c] = per_channel ? next[c] : next[c] * next_decay[0];
        key = next_key, decay = next_decay;
    }
#undef DECAY
#undef EACH
}

/* One head's delta rule, block by block. */
INLINE void run_head(const struct delta_net *net, int64_t sequence, int64_t number, const int per_channel) {
    const struct work work = work_of(net, sequence);
    const int64_t width = net->value_width, keys = keys_of(net);
    const int64_t key_head = number / (net->value_heads / net->key_heads) * net->key_width;
    float *state = net->states + net->slots[sequence] * net->stride + number * net->key_width * width;
    const struct head head = {
        .q = work.mixed + key_head,
        .k = work.mixed + keys + key_head,
        .v = work.mixed + 2 * keys + number * width,
        .decay = work.decay + (per_channel ? key_head : number),
        .strength = work.strength + number,
        .out = work.output + number * width,
        .length = net->length,
        .channels = net->conv.channels,
        .decays = decays_of(net),
        .strengths = net->value_heads,
        .outputs = values_of(net),
        .key_width = net->key_width,
        .value_width = width,
    };
    int64_t column = 0;
    for (; column + COLUMNS * LANES <= width; column += COLUMNS * LANES)
        delta_rule(&head, state, column, COLUMNS, per_channel);
    for (; column < width; column += LANES) delta_rule(&head, state, column, 1, per_channel);
}

/* Decays of one token by channel: e^(-rate * softplus(a + bias)), or e^(bound * sigmoid(rate * (a + bias))). */
INLINE void decays_by_channel(const struct delta_net *net, float *decay, int64_t token, enum type type) {
    for (int64_t head = 0; head < net->key_heads; head++) {
        float rate = expf(weight_number(net->decay, head, net->has_float32_decay, type));
        if (net->rounds_decays && !net->has_float32_decay) rate = rounded_number(rate, type);
        const void *given = head_of(&net->a, token, head, 1, type);
        for (int64_t i = 0; i < net->key_width; i += LANES) {
            const int64_t at = head * net->key_width + i;
            floats x = take(element(given, i, type), type);
            x += take_weights(net->decay_bias, at, net->has_float32_bias, type);
            floats log = splat(net->lower_bound);
            if (net->lower_bound != 0.0f) {
                x *= rate;
                times_sigmoid(&log, &x, 1, FLOAT32);
            } else {
                log = softplus_of(x) * -rate;
            }
            if (net->rounds_decays) log = rounded(log, type);
            give(decay + at, exp2_of(log * LOG2_E, FLOAT32), FLOAT32);
        }
    }
}

/* The gates of one token. */
INLINE void gate(const struct delta_net *net, const struct work *work, int64_t token, int64_t t, enum type type) {
    const int64_t each = net->value_heads / net->key_heads;
    float *decay = work->decay + t * decays_of(net), *strength = work->strength + t * net->value_heads;
    for (int64_t head = 0; head < net->value_heads; head++) {
        const float b = number(head_of(&net->b, token, head, each, type), 0, type);
        strength[head] = net->strength * rounded_number(1.0f / (1.0f + expf(-b)), type);
    }
    if (net->is_per_channel) {
        decays_by_channel(net, decay, token, type);
        return;
    }
    for (int64_t head = 0; head < net->value_heads; head++) {
        const float a = number(head_of(&net->a, token, head, each, type), 0, type);
        const float rate = expf(weight_number(net->decay, head, net->has_float32_decay, type));
        const float bias = weight_number(net->decay_bias, head, net->has_float32_bias, type);
        decay[head] = expf(-rate * softplus(a + bias));
    }
}

/* The convolution and the gates of one token. */
INLINE void prepare(
    const struct delta_net *net, const float *weight, int64_t sequence, int64_t t, enum type type) {
    const struct work work = work_of(net, sequence);
    const int64_t keys = keys_of(net), each = net->value_heads / net->key_heads, start = sequence * net->length;
    float *mixed = work.mixed + t * net->conv.channels;
    const struct channels q = {0, net->key_heads, 1, net->key_width}, k = {keys, net->key_heads, 1, net->key_width};
    const struct channels v = {2 * keys, net->value_heads, each, net->value_width};
    convolve(&net->conv, weight, work.past, &net->q, q, start, t, mixed, 1, type);
    convolve(&net->conv, weight, work.past, &net->k, k, start, t, mixed, 1, type);
    convolve(&net->conv, weight, work.past, &net->v, v, start, t, mixed, 1, type);
    const float scale = 1.0f / sqrtf((float)net->key_width);
    for (int64_t head = 0; head < 2 * net->key_heads; head++)
        normalise(mixed + head * net->key_width, net->key_width, head < net->key_heads ? scale : 1.0f);
    gate(net, &work, start + t, t, type);
}

/* The last inputs of the convolution before and after the tokens. */
INLINE void exchange_past(const struct delta_net *net, int64_t sequence, enum type type) {
    const struct work work = work_of(net, sequence);
    const int64_t keys = keys_of(net), each = net->value_heads / net->key_heads, start = sequence * net->length;
    const int64_t slot = net->slots[sequence];
    const struct channels q = {0, net->key_heads, 1, net->key_width}, k = {keys, net->key_heads, 1, net->key_width};
    const struct channels v = {2 * keys, net->value_heads, each, net->value_width};
    recall(&net->conv, slot, work.past, type);
    remember(&net->conv, slot, work.past, &net->q, q, start, net->length, type);
    remember(&net->conv, slot, work.past, &net->k, k, start, net->length, type);
    remember(&net->conv, slot, work.past, &net->v, v, start, net->length, type);
}

/* The norm of each head's output of one token, gated by z. */
INLINE void gated_norm(const struct delta_net *net, const float *output, int64_t token, enum type type) {
    const int64_t width = net->value_width, each = net->value_heads / net->key_heads;
    for (int64_t head = 0; head < net->value_heads; head++, output += width) {
        const void *gate = head_of(&net->z, token, head, each, type);
        char *out = (char *)net->out + (token * net->value_heads + head) * width * (int64_t)size_of(type);
        floats squares = {0};
        for (int64_t i = 0; i < width; i += LANES) {
            floats value = rounded(take(output + i, FLOAT32), type);
            squares += value * value;
        }
        const float scale = 1.0f / sqrtf(sum_of_lanes(squares) / (float)width + net->epsilon);
        for (int64_t i = 0; i < width; i += LANES) {
            floats value = rounded(take(output + i, FLOAT32), type) * scale, z = take(element(gate, i, type), type);
            if (net->is_per_channel) {
                value *= take(element(net->norm, i, type), type);
                times_sigmoid(&value, &z, 1, FLOAT32);
            } else {
                value = rounded(take(element(net->norm, i, type), type) * rounded(value, type), type);
                silu(&z, 1, FLOAT32);
                value *= z;
            }
            give(out + i * size_of(type), value, type);
        }
    }
}

/* All widths are multiples of LANES. */
INLINE void run(const struct delta_net *net, enum type type) {
    const int64_t length = net->length, tokens = net->sequences * length;
    weight_by_taps(&net->conv, net->scratch, type);
#pragma omp parallel
    {
#pragma omp for schedule(static)
        for (int64_t sequence = 0; sequence < net->sequences; sequence++) exchange_past(net, sequence, type);
#pragma omp for schedule(static)
        for (int64_t token = 0; token < tokens; token++)
            prepare(net, net->scratch, token / length, token % length, type);
#pragma omp for schedule(static) collapse(2)
        for (int64_t sequence = 0; sequence < net->sequences; sequence++)
            for (int64_t head = 0; head < net->value_heads; head++) {
                if (net->is_per_channel)
                    run_head(net, sequence, head, 1);
                else
                    run_head(net, sequence, head, 0);
            }
#pragma omp for schedule(static)
        for (int64_t token = 0; token < tokens; token++) {
            const struct work work = work_of(net, token / length);
            gated_norm(net, work.output + token % length * values_of(net), token, type);
        }
    }
}

void delta_net_bf16(const struct delta_net *net) { run(net, BFLOAT16); }
void delta_net_f32(const struct delta_net *net) { run(net, FLOAT32); }
CALL(delta_net_bf16, ADDRESS(0))
CALL(delta_net_f32, ADDRESS(0))
