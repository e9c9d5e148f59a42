/* Mamba 2: short convolution and state-space recurrence of own heads, for all tokens of some sequences; then its norm.
 *
 * The recurrence (Dao and Gu, "Transformers are SSMs", ICML 2024) goes through LANES tokens at a time: rows of the
 * state stay in registers while the tokens pass, so that the state is read and written once per LANES tokens. Results
 * are rounded where transformers rounds: several tokens of a sequence are computed in float32, a single one is not. */
#include <math.h>

#include "call.h"
#include "short_convolution.h"
#include "softplus.h"

enum { VECTORS = 8, ROWS = LANES == 16 ? 2 : 1, MOST_WIDTH = 256 };

/* Inputs: z and x [heads * width], B and C [groups * states], dt [heads] of each token, one after another. */
struct state_space {
    struct convolution conv; /* over x, B and C */
    const void *inputs;      /* tokens `row` elements apart */
    int64_t row, sequences, length, heads, groups, width, num_states;
    const void *rates, *step_bias, *skip; /* A_log, dt_bias, D: [heads] */
    float *states;                        /* [slots][heads, width, num_states], `stride` apart */
    int64_t stride;
    const int64_t *slots;
    float *scratch; /* floats_of_state_space */
    float *output;  /* before the norm: [sequences * length, heads * width] */
    /* Sums of squares of the output, for the norm: [sequences * length, sums]. Own heads fill `own_sums` columns from
     * `first_sum` on; the others are set to zero. */
    float *squares;
    int64_t sums, first_sum, own_sums;
    int64_t gates_output; /* whether the output is multiplied by silu(z) before the norm */
    float shortest, longest; /* time steps */
};

/* What is kept of one sequence during the call. */
struct work {
    float *past;  /* [taps, channels], of the type of the inputs */
    float *mixed; /* results of the convolution: [length, channels] */
    float *steps; /* [length, heads] */
    float *decay; /* [length, heads] */
};

static int64_t inner_of(const struct state_space *ssm) { return ssm->heads * ssm->width; }

static int64_t sequence_floats(const struct state_space *ssm) {
    return past_floats(&ssm->conv) + ssm->length * (ssm->conv.channels + 2 * ssm->heads);
}

int64_t floats_of_state_space(const struct state_space *ssm) {
    return weight_floats(&ssm->conv) + ssm->sequences * sequence_floats(ssm);
}

static struct work work_of(const struct state_space *ssm, int64_t sequence) {
    struct work work;
    work.past = ssm->scratch + weight_floats(&ssm->conv) + sequence * sequence_floats(ssm);
    work.mixed = work.past + past_floats(&ssm->conv);
    work.steps = work.mixed + ssm->length * ssm->conv.channels;
    work.decay = work.steps + ssm->length * ssm->heads;
    return work;
}

/* The convolution, the time steps and the decays of one token. */
INLINE void prepare(const struct state_space *ssm, int64_t sequence, int64_t t, enum type type) {
    const struct work work = work_of(ssm, sequence);
    const int64_t start = sequence * ssm->length, inner = inner_of(ssm);
    const struct fed mixed = {element(ssm->inputs, inner, type), ssm->row, 0, 0};
    const struct channels all = {0, 1, 1, ssm->conv.channels};
    convolve(
        &ssm->conv, ssm->scratch, work.past, &mixed, all, start, t, work.mixed + t * ssm->conv.channels, 1, type);
    const void *given = element(ssm->inputs, (start + t) * ssm->row + inner + ssm->conv.channels, type);
    for (int64_t head = 0; head < ssm->heads; head++) {
        float step = rounded_number(number(given, head, type) + number(ssm->step_bias, head, type), type);
        step = rounded_number(softplus(step), type);
        step = fminf(fmaxf(step, ssm->shortest), ssm->longest);
        step = rounded_number(step, type);
        work.steps[t * ssm->heads + head] = step;
        work.decay[t * ssm->heads + head] = expf(-expf(number(ssm->rates, head, type)) * step);
    }
}

INLINE void exchange_past(const struct state_space *ssm, int64_t sequence, enum type type) {
    const struct work work = work_of(ssm, sequence);
    const struct fed mixed = {element(ssm->inputs, inner_of(ssm), type), ssm->row, 0, 0};
    const struct channels all = {0, 1, 1, ssm->conv.channels};
    recall(&ssm->conv, ssm->slots[sequence], work.past, type);
    remember(
        &ssm->conv, ssm->slots[sequence], work.past, &mixed, all, sequence * ssm->length, ssm->length, type);
}

/* Some tokens of one head, up to LANES, and the distances between them. */
struct tokens {
    const float *x, *in, *out, *steps, *decay; /* in: B, out: C */
    int64_t count, channels, heads, width, num_states;
};

/* `n` vectors of `rows` rows of the state, from `first` on: adds what each token reads of them to sums[rows][LANES]. */
INLINE void pass_rows(
    const struct tokens *tokens, float *state, int64_t row, int64_t first, float (*sums)[LANES], const int rows,
    const int n, const int single, enum type type) {
    floats now[ROWS * VECTORS];
    float parts[ROWS][LANES][LANES] __attribute__((aligned(64)));
#define EACH_ROW UNROLL for (int r = 0; r < rows; r++)
#define EACH UNROLL for (int v = 0; v < n; v++)
    EACH_ROW EACH now[r * n + v] = take(state + (row + r) * tokens->num_states + first + v * LANES, FLOAT32);
    for (int64_t t = 0; t < tokens->count; t++) {
        const float *in = tokens->in + t * tokens->channels + first, *out = tokens->out + t * tokens->channels + first;
        const float *x = tokens->x + t * tokens->channels + row;
        const float step = tokens->steps[t * tokens->heads], decay = tokens->decay[t * tokens->heads];
        EACH_ROW {
            floats sum = {0};
            const float given = single ? x[r] : step * x[r];
            EACH {
                floats added = take(in + v * LANES, FLOAT32);
                added = single ? rounded(rounded(added * step, type) * given, type) : added * given;
                now[r * n + v] = now[r * n + v] * decay + added;
                sum += (single ? rounded(now[r * n + v], type) : now[r * n + v]) * take(out + v * LANES, FLOAT32);
            }
            give(parts[r][t], sum, FLOAT32);
        }
    }
    EACH_ROW EACH give(state + (row + r) * tokens->num_states + first + v * LANES, now[r * n + v], FLOAT32);
    EACH_ROW {
        if (single) {
            sums[row + r][0] += sum_of_lanes(take(parts[r][0], FLOAT32));
            continue;
        }
        floats square[LANES], total = {0};
        UNROLL for (int t = 0; t < LANES; t++) square[t] = t < tokens->count ? take(parts[r][t], FLOAT32) : splat(0.0f);
        transpose_square(square);
        UNROLL for (int lane = 0; lane < LANES; lane++) total += square[lane];
        give(sums[row + r], take(sums[row + r], FLOAT32) + total, FLOAT32);
    }
#undef EACH
#undef EACH_ROW
}

INLINE void pass_state(
    const struct tokens *tokens, float *state, float (*sums)[LANES], const int single, enum type type) {
    for (int64_t row = 0; row < tokens->width; row++)
        for (int lane = 0; lane < LANES; lane++) sums[row][lane] = 0.0f;
    int64_t first = 0;
    for (; first + VECTORS * LANES <= tokens->num_states; first += VECTORS * LANES)
        for (int64_t row = 0; row < tokens->width; row += ROWS)
            pass_rows(tokens, state, row, first, sums, ROWS, VECTORS, single, type);
    for (; first < tokens->num_states; first += LANES)
        for (int64_t row = 0; row < tokens->width; row += ROWS)
            pass_rows(tokens, state, row, first, sums, ROWS, 1, single, type);
}

/* What each token reads, plus x * D: output[count][width], tokens `apart`. */
INLINE void write_output(
    const struct tokens *tokens, float (*sums)[LANES], float skip, float *output, int64_t apart, const int single,
    enum type type) {
    for (int64_t row = 0; row < tokens->width; row += LANES) {
        floats square[LANES];
        UNROLL for (int i = 0; i < LANES; i++) square[i] = take(sums[row + i], FLOAT32);
        transpose_square(square);
        for (int64_t t = 0; t < tokens->count; t++) {
            floats x = take(tokens->x + t * tokens->channels + row, FLOAT32) * skip, value = square[t];
            if (single) value = rounded(rounded(value, type) + rounded(x, type), type);
            else value += x;
            give(output + t * apart + row, value, FLOAT32);
        }
    }
}

INLINE void run_head(const struct state_space *ssm, int64_t sequence, int64_t head, const int single, enum type type) {
    const struct work work = work_of(ssm, sequence);
    const int64_t channels = ssm->conv.channels, inner = inner_of(ssm);
    const int64_t group = head / (ssm->heads / ssm->groups) * ssm->num_states;
    float *state = ssm->states + ssm->slots[sequence] * ssm->stride + head * ssm->width * ssm->num_states;
    float sums[MOST_WIDTH][LANES] __attribute__((aligned(64)));
    for (int64_t t = 0; t < ssm->length; t += LANES) {
        const float *mixed = work.mixed + t * channels;
        const struct tokens tokens = {
            .x = mixed + head * ssm->width,
            .in = mixed + inner + group,
            .out = mixed + inner + ssm->groups * ssm->num_states + group,
            .steps = work.steps + t * ssm->heads + head,
            .decay = work.decay + t * ssm->heads + head,
            .count = t + LANES <= ssm->length ? LANES : ssm->length - t,
            .channels = channels,
            .heads = ssm->heads,
            .width = ssm->width,
            .num_states = ssm->num_states,
        };
        pass_state(&tokens, state, sums, single, type);
        float *output = ssm->output + (sequence * ssm->length + t) * inner + head * ssm->width;
        write_output(&tokens, sums, number(ssm->skip, head, type), output, inner, single, type);
    }
}

/* The gate of one token, and its sums of squares. */
INLINE void gate_token(const struct state_space *ssm, int64_t token, enum type type) {
    const int64_t inner = inner_of(ssm), width = ssm->own_sums ? inner / ssm->own_sums : inner;
    float *output = ssm->output + token * inner, *squares = ssm->squares + token * ssm->sums;
    const void *z = element(ssm->inputs, token * ssm->row, type);
    for (int64_t i = 0; i < ssm->sums; i++) squares[i] = 0.0f;
    for (int64_t first = 0; first < inner; first += width) {
        floats sum = {0};
        for (int64_t i = first; i < first + width; i += LANES) {
            floats value = take(output + i, FLOAT32);
            if (ssm->gates_output) {
                floats gate = take(element(z, i, type), type);
                silu(&gate, 1, FLOAT32);
                value *= gate;
                give(output + i, value, FLOAT32);
            }
            sum += value * value;
        }
        if (ssm->own_sums) squares[ssm->first_sum + first / width] = sum_of_lanes(sum);
    }
}

/* All widths are multiples of LANES; width is at most MOST_WIDTH. */
INLINE void run(const struct state_space *ssm, enum type type) {
    const int64_t length = ssm->length, tokens = ssm->sequences * length;
    weight_by_taps(&ssm->conv, ssm->scratch, type);
#pragma omp parallel
    {
#pragma omp for schedule(static)
        for (int64_t sequence = 0; sequence < ssm->sequences; sequence++) exchange_past(ssm, sequence, type);
#pragma omp for schedule(static)
        for (int64_t token = 0; token < tokens; token++) prepare(ssm, token / length, token % length, type);
#pragma omp for schedule(static) collapse(2)
        for (int64_t sequence = 0; sequence < ssm->sequences; sequence++)
            for (int64_t head = 0; head < ssm->heads; head++) {
                if (length == 1)
                    run_head(ssm, sequence, head, 1, type);
                else
                    run_head(ssm, sequence, head, 0, type);
            }
#pragma omp for schedule(static)
        for (int64_t token = 0; token < tokens; token++) gate_token(ssm, token, type);
    }
}

void state_space_bf16(const struct state_space *ssm) { run(ssm, BFLOAT16); }
void state_space_f32(const struct state_space *ssm) { run(ssm, FLOAT32); }
CALL(state_space_bf16, ADDRESS(0))
CALL(state_space_f32, ADDRESS(0))

/* -- the norm ------------------------------------------------------------------------------------------------- */

struct state_space_norm {
    const float *output, *squares; /* of state_space; the sums over all ranks */
    const void *inputs, *weight;   /* inputs: z first; weight: [inner], or NULL for no norm */
    void *out;                     /* [tokens, inner] */
    int64_t row, tokens, inner, sums, first_sum, own_sums;
    int64_t group;       /* features of all ranks in each sum */
    int64_t is_single;   /* whether the output is that of single tokens, which transformers rounds */
    int64_t gates_last;  /* whether to multiply by silu(z), or by the sigmoid, after the norm */
    int64_t is_sigmoid;
    int64_t rounds_unit; /* whether single tokens are rounded before they are multiplied by the weight */
    float epsilon;
};

INLINE void norm_token(const struct state_space_norm *norm, int64_t token, enum type type) {
    const int64_t width = norm->own_sums ? norm->inner / norm->own_sums : norm->inner;
    const float *output = norm->output + token * norm->inner, *squares = norm->squares + token * norm->sums;
    const void *z = element(norm->inputs, token * norm->row, type);
    char *out = (char *)norm->out + token * norm->inner * (int64_t)size_of(type);
    for (int64_t first = 0; first < norm->inner; first += width) {
        float scale = 1.0f;
        if (norm->weight)
            scale = 1.0f / sqrtf(squares[norm->first_sum + first / width] / (float)norm->group + norm->epsilon);
        for (int64_t i = first; i < first + width; i += LANES) {
            floats value = take(output + i, FLOAT32) * scale;
            if (norm->weight) {
                if (norm->rounds_unit && norm->is_single) value = rounded(value, type);
                value *= take(element(norm->weight, i, type), type);
            }
            if (norm->gates_last) {
                floats gate = take(element(z, i, type), type), open = splat(1.0f);
                if (norm->is_sigmoid) {
                    times_sigmoid(&open, &gate, 1, FLOAT32);
                    value = rounded(value, type) * rounded(open, type);
                } else {
                    silu(&gate, 1, FLOAT32);
                    value *= norm->weight ? gate : rounded(gate, type);
                }
            }
            give(out + i * size_of(type), value, type);
        }
    }
}

INLINE void run_norm(const struct state_space_norm *norm, enum type type) {
#pragma omp parallel for schedule(static)
    for (int64_t token = 0; token < norm->tokens; token++) norm_token(norm, token, type);
}

void state_space_norm_bf16(const struct state_space_norm *norm) { run_norm(norm, BFLOAT16); }
void state_space_norm_f32(const struct state_space_norm *norm) { run_norm(norm, FLOAT32); }
CALL(state_space_norm_bf16, ADDRESS(0))
CALL(state_space_norm_f32, ADDRESS(0))
