/* Routing of tokens to experts: the choice of experts, the order of rows by expert, and the sum over experts.
 *
 * Counts stay in memory, so the caller need not know how many tokens chose an expert. */
#include <math.h>
#include <stdlib.h>

#include "call.h"
#include "product.h"

#define MOST_EXPERTS 1024
#define PARALLEL_FROM 65536 /* elements; for fewer, starting threads costs more than it saves */

/* -- the choice ------------------------------------------------------------------------------------------------ */

/* How a router chooses. The same fields as in `RoutingRule` (native_routing.py), all of them 64-bit. */
struct rule {
    int64_t sigmoid;    /* scores are sigmoids, else probabilities (softmax) */
    int64_t normalise;  /* weights are divided by their sum */
    int64_t groups;     /* of consecutive experts, of which `kept_groups` best are candidates; 0: all are */
    int64_t kept_groups;
    int64_t best_of_group; /* a group's score is the sum of this many best of its scores */
    double scale;          /* of the weights */
};

static void scores_of(const char *logits, int64_t first, int64_t count, enum type type, int sigmoid, float *scores) {
    float most = -INFINITY, sum = 0;
    for (int64_t e = 0; e < count; e++) scores[e] = one_of(logits, first + e, type);
    if (sigmoid) {
        for (int64_t e = 0; e < count; e++) scores[e] = 1.0f / (1.0f + expf(-scores[e]));
        return;
    }
    for (int64_t e = 0; e < count; e++) most = scores[e] > most ? scores[e] : most;
    for (int64_t e = 0; e < count; e++) sum += scores[e] = expf(scores[e] - most);
    for (int64_t e = 0; e < count; e++) scores[e] /= sum;
}

/* The place of the greatest of values that are not taken yet, the first of equals; NaN is never greater. */
static int64_t best_left(const float *values, const uint8_t *taken, int64_t count) {
    int64_t best = -1;
    for (int64_t i = 0; i < count; i++)
        if (!taken[i] && (best < 0 || values[i] > values[best])) best = i;
    return best;
}

/* Take out all experts but those of the best groups. */
static void keep_groups(const struct rule *rule, const float *scores, uint8_t *taken, int64_t count) {
    const int64_t size = count / rule->groups;
    float best[MOST_EXPERTS];
    uint8_t used[MOST_EXPERTS] = {0}, is_kept[MOST_EXPERTS] = {0};
    for (int64_t g = 0; g < rule->groups; g++) {
        best[g] = 0;
        for (int64_t i = 0; i < rule->best_of_group && i < size; i++) {
            const int64_t found = best_left(scores + g * size, used + g * size, size);
            best[g] += scores[g * size + found], used[g * size + found] = 1;
        }
    }
    for (int64_t i = 0; i < rule->kept_groups && i < rule->groups; i++) is_kept[best_left(best, is_kept, rule->groups)] = 1;
    for (int64_t e = 0; e < count; e++) taken[e] = !is_kept[e / size];
}

static void put_weight(char *weights, int64_t place, float value, int64_t type) {
    if (type == FLOAT32)
        ((float *)weights)[place] = value;
    else if (type == FLOAT16)
        ((float16 *)weights)[place] = half_of(value);
    else
        ((bfloat16 *)weights)[place] = bfloat16_of(value);
}

static void choose_token(const struct rule *rule, const char *logits, int64_t logits_type, const float *bias,
                         char *weights, int64_t weights_type, int64_t *experts, int64_t token, int64_t count,
                         int64_t top_k) {
    float scores[MOST_EXPERTS], ranked[MOST_EXPERTS], found[MOST_EXPERTS], sum = 0;
    uint8_t taken[MOST_EXPERTS] = {0};
    scores_of(logits, token * count, count, (enum type)logits_type, (int)rule->sigmoid, scores);
    for (int64_t e = 0; e < count; e++) ranked[e] = scores[e] + (bias ? bias[e] : 0);
    if (rule->groups) keep_groups(rule, ranked, taken, count);
    for (int64_t i = 0; i < top_k; i++) {
        int64_t best = best_left(ranked, taken, count);
        best = best < 0 ? 0 : best; /* fewer candidates than choices */
        taken[best] = 1, experts[token * top_k + i] = best, sum += found[i] = scores[best];
    }
    for (int64_t i = 0; i < top_k; i++) {
        const float weight = rule->normalise ? found[i] / sum : found[i];
        put_weight(weights, token * top_k + i, weight * (float)rule->scale, weights_type);
    }
}

/* logits: [rows, count] of `logits_type`, at most MOST_EXPERTS; bias: [count], added to the scores that are compared, or
 * null; weights: [rows, top_k] of `weights_type`; experts: [rows, top_k]. */
void choose_experts(const struct rule *rule, const char *logits, int64_t logits_type, const float *bias, char *weights,
                    int64_t weights_type, int64_t *experts, int64_t rows, int64_t count, int64_t top_k) {
#pragma omp parallel for schedule(static) if (rows * count > PARALLEL_FROM / 16)
    for (int64_t token = 0; token < rows; token++)
        choose_token(rule, logits, logits_type, bias, weights, weights_type, experts, token, count, top_k);
}

CALL(choose_experts, ADDRESS(0), ADDRESS(1), NUMBER(2), ADDRESS(3), ADDRESS(4), NUMBER(5), ADDRESS(6), NUMBER(7),
     NUMBER(8), NUMBER(9))

/* -- products in float32 of what is stored in another type ------------------------------------------------------- */

INLINE float dot_of(const char *x, const char *y, int64_t width, enum type type) {
    floats sum = {0}, other = {0};
    const int64_t size = (int64_t)size_of(type);
    int64_t k = 0;
    for (; k + 2 * LANES <= width; k += 2 * LANES) {
        sum += take(x + k * size, type) * take(y + k * size, type);
        other += take(x + (k + LANES) * size, type) * take(y + (k + LANES) * size, type);
    }
    for (; k < width; k += LANES) {
        const int some = width - k < LANES ? (int)(width - k) : LANES;
        sum += take_some(x + k * size, some, type) * take_some(y + k * size, some, type);
    }
    return sum_of_lanes(sum + other);
}

/* x: [rows, width]; weight: [count, width]; logits: [rows, count], not rounded. */
#define LOGITS(name, type)                                                                                           \
    void logits_##name(const char *x, const char *weight, float *logits, int64_t rows, int64_t count, int64_t width, \
                       int64_t x_stride, int64_t weight_stride) {                                                    \
        _Pragma("omp parallel for schedule(static) if (rows * count * width > 2 * (int64_t)WORK_A_THREAD)")           \
        for (int64_t e = 0; e < count; e++)                                                                          \
            for (int64_t t = 0; t < rows; t++)                                                                       \
                logits[t * count + e] = dot_of(x + t * x_stride * size_of(type),                                     \
                                               weight + e * weight_stride * size_of(type), width, type);             \
    }                                                                                                                \
    CALL(logits_##name, ADDRESS(0), ADDRESS(1), ADDRESS(2), NUMBER(3), NUMBER(4), NUMBER(5), NUMBER(6), NUMBER(7))

LOGITS(bfloat16, BFLOAT16)
LOGITS(float16, FLOAT16)

/* -- the order ------------------------------------------------------------------------------------------------- */

INLINE int64_t expert_of(const char *experts, int64_t place, int64_t is_wide, int64_t first, int64_t own) {
    const int64_t expert = (is_wide ? ((const int64_t *)experts)[place] : ((const int32_t *)experts)[place]) - first;
    return expert >= 0 && expert < own ? expert : own;
}

/* Rows by expert, in a stable order; those of experts that this rank does not own come last.
 *
 * experts: [num_tokens][top_k], `stride` apart, int64 or int32. offsets: [own + 1], where the rows of each end, and their
 * number. counts: [own], added to. tokens: [rows], the token of each row. rows: [num_tokens * top_k], the row of each
 * choice, -1 for experts that are not own. */
void sort_by_expert(const char *experts, int64_t is_wide, int64_t stride, int32_t *offsets, int64_t *counts,
                    int64_t *tokens, int32_t *rows, int64_t num_tokens, int64_t top_k, int64_t first, int64_t own) {
    memset(offsets, 0, (own + 1) * sizeof *offsets);
    for (int64_t t = 0; t < num_tokens; t++)
        for (int64_t i = 0; i < top_k; i++) offsets[expert_of(experts, t * stride + i, is_wide, first, own)]++;
    int32_t start = 0;
    for (int64_t e = 0; e <= own; e++) {
        const int32_t count = offsets[e];
        if (e < own) counts[e] += count;
        offsets[e] = start, start += count;
    }
    for (int64_t t = 0; t < num_tokens; t++)
        for (int64_t i = 0; i < top_k; i++) {
            const int64_t expert = expert_of(experts, t * stride + i, is_wide, first, own);
            const int32_t row = offsets[expert]++; /* at the end of all, the start of the next expert's */
            tokens[row] = t, rows[t * top_k + i] = expert < own ? row : -1;
        }
}

CALL(sort_by_expert, ADDRESS(0), NUMBER(1), NUMBER(2), ADDRESS(3), ADDRESS(4), ADDRESS(5), ADDRESS(6), NUMBER(7),
     NUMBER(8), NUMBER(9), NUMBER(10))

/* -- the sum --------------------------------------------------------------------------------------------------- */

INLINE float weight_at(const char *weights, int64_t i, int64_t type) { return one_of(weights, i, (enum type)type); }

/* result[t] = added[t] + sum over i of weights[t][i] * outputs[rows[t][i]]; rows of -1 count as zero. Products are
 * rounded to the outputs' type unless `wide`. weights of `weights_type`, or null: 1. added: or null. */
#define SUM(name, type)                                                                                              \
    INLINE void sum_row_##name(const char *outputs, const char *weights, int64_t weights_type, const int32_t *rows,  \
                               const char *added, char *result, int64_t top_k, int64_t width, int64_t wide) {        \
        const int64_t size = (int64_t)size_of(type);                                                                 \
        for (int64_t k = 0; k < width; k += LANES) {                                                                 \
            const int some = width - k < LANES ? (int)(width - k) : LANES;                                           \
            floats sum = {0};                                                                                        \
            if (added) sum = take_some(added + k * size, some, type);                                                \
            for (int64_t i = 0; i < top_k; i++) {                                                                    \
                if (rows[i] < 0) continue;                                                                           \
                floats part = take_some(outputs + (rows[i] * width + k) * size, some, type);                         \
                if (weights) part *= weight_at(weights, i, weights_type);                                            \
                sum += wide ? part : rounded(part, type);                                                            \
            }                                                                                                        \
            give_some(result + k * size, sum, some, type);                                                           \
        }                                                                                                            \
    }                                                                                                                \
    void sum_of_experts_##name(const char *outputs, const char *weights, int64_t weights_type, int64_t stride,       \
                               const int32_t *rows, const char *added, char *result, int64_t tokens, int64_t top_k,  \
                               int64_t width, int64_t wide) {                                                        \
        const int64_t size = (int64_t)size_of(type), of_weight = weights_type == FLOAT32 ? 4 : 2;                    \
        _Pragma("omp parallel for schedule(static) if (tokens * top_k * width > PARALLEL_FROM)")                     \
        for (int64_t t = 0; t < tokens; t++)                                                                         \
            sum_row_##name(outputs, weights ? weights + t * stride * of_weight : 0, weights_type, rows + t * top_k,  \
                           added ? added + t * width * size : 0, result + t * width * size, top_k, width, wide);     \
    }                                                                                                                \
    CALL(sum_of_experts_##name, ADDRESS(0), ADDRESS(1), NUMBER(2), NUMBER(3), ADDRESS(4), ADDRESS(5), ADDRESS(6),    \
         NUMBER(7), NUMBER(8), NUMBER(9), NUMBER(10))

SUM(bfloat16, BFLOAT16)
SUM(float16, FLOAT16)
SUM(float32, FLOAT32)

/* Gather `count` rows of a table, `bytes` each. */
void take_tokens(char *to, const char *table, const int64_t *rows, int64_t count, int64_t bytes, int64_t stride) {
#pragma omp parallel for schedule(static) if (count * bytes > PARALLEL_FROM * 4)
    for (int64_t i = 0; i < count; i++) memcpy(to + i * bytes, table + rows[i] * stride, bytes);
}

CALL(take_tokens, ADDRESS(0), ADDRESS(1), ADDRESS(2), NUMBER(3), NUMBER(4), NUMBER(5))
