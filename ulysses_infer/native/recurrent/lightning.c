/* Lightning attention of own heads, for all tokens of some sequences: a state that decays by a constant per head.
 *
 * It (Qin et al., 2024) goes token by token over a block of the state's columns that stays in the first-level cache.
 * Products and sums are float32; the output is rounded to the type of the inputs. */
#include <math.h>

#include "call.h"
#include "short_convolution.h"

enum { COLUMNS = 4 }; /* vectors of a block */

/* Inputs: q, k and v of one head after another, before SiLU; q, k and v have `width` features. */
struct lightning {
    const void *inputs; /* tokens `row` elements apart */
    int64_t row, sequences, length, heads, width;
    const void *slopes; /* log of the decays, negated: [heads] */
    int64_t has_float32_slopes;
    float *states; /* [slots][heads, width (keys), width (values)], `stride` apart */
    int64_t stride;
    const int64_t *slots;
    float *scratch; /* floats_of_lightning */
    float *output;  /* [sequences * length, heads * width] */
    float *squares; /* [sequences * length]: sums of squares of the output */
};

/* q, k and v after SiLU: [sequences, heads, length, 3 * width]. */
int64_t floats_of_lightning(const struct lightning *args) {
    return args->sequences * args->heads * args->length * 3 * args->width;
}

INLINE void activate(const struct lightning *args, float *to, int64_t token, int64_t head, enum type type) {
    const int64_t features = 3 * args->width;
    const void *from = element(args->inputs, token * args->row + head * features, type);
    for (int64_t i = 0; i < features; i += LANES) {
        floats value = take(element(from, i, type), type);
        silu(&value, 1, type);
        give(to + i, rounded(value, type), FLOAT32);
    }
}

/* `n` vectors of the state's columns, from `column` on, for the tokens of one head. */
INLINE void pass_columns(
    float *state, const float *tokens, float *output, float decay, int64_t column, int64_t length, int64_t width,
    int64_t apart, const int n, enum type type) {
#define EACH UNROLL for (int c = 0; c < n; c++)
    for (int64_t t = 0; t < length; t++) {
        const float *query = tokens + t * 3 * width, *key = query + width, *value = key + width + column;
        floats given[COLUMNS], sum[COLUMNS];
        EACH given[c] = take(value + c * LANES, FLOAT32);
        EACH sum[c] = splat(0.0f);
        for (int64_t i = 0; i < width; i++) {
            float *row = state + i * width + column;
            floats now[COLUMNS];
            EACH now[c] = take(row + c * LANES, FLOAT32) * decay + given[c] * key[i];
            EACH give(row + c * LANES, now[c], FLOAT32);
            EACH sum[c] += now[c] * query[i];
        }
        EACH give(output + t * apart + column + c * LANES, rounded(sum[c], type), FLOAT32);
    }
#undef EACH
}

INLINE void run_head(const struct lightning *args, int64_t sequence, int64_t head, enum type type) {
    const int64_t length = args->length, width = args->width, inner = args->heads * width;
    float *tokens = args->scratch + (sequence * args->heads + head) * length * 3 * width;
    float *state = args->states + args->slots[sequence] * args->stride + head * width * width;
    float *output = args->output + sequence * length * inner + head * width;
    const float decay = expf(-weight_number(args->slopes, head, args->has_float32_slopes, type));
    for (int64_t t = 0; t < length; t++) activate(args, tokens + t * 3 * width, sequence * length + t, head, type);
    int64_t column = 0;
    for (; column + COLUMNS * LANES <= width; column += COLUMNS * LANES)
        pass_columns(state, tokens, output, decay, column, length, width, inner, COLUMNS, type);
    for (; column < width; column += LANES)
        pass_columns(state, tokens, output, decay, column, length, width, inner, 1, type);
}

INLINE void sum_squares(const struct lightning *args, int64_t token) {
    const int64_t inner = args->heads * args->width;
    floats sum = {0};
    for (int64_t i = 0; i < inner; i += LANES) {
        floats value = take(args->output + token * inner + i, FLOAT32);
        sum += value * value;
    }
    args->squares[token] = sum_of_lanes(sum);
}

/* The width is a multiple of LANES. */
INLINE void run(const struct lightning *args, enum type type) {
#pragma omp parallel
    {
#pragma omp for schedule(static) collapse(2)
        for (int64_t sequence = 0; sequence < args->sequences; sequence++)
            for (int64_t head = 0; head < args->heads; head++) run_head(args, sequence, head, type);
#pragma omp for schedule(static)
        for (int64_t token = 0; token < args->sequences * args->length; token++) sum_squares(args, token);
    }
}

void lightning_bf16(const struct lightning *args) { run(args, BFLOAT16); }
void lightning_f32(const struct lightning *args) { run(args, FLOAT32); }
CALL(lightning_bf16, ADDRESS(0))
CALL(lightning_f32, ADDRESS(0))
