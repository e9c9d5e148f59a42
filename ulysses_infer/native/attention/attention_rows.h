/* Attention for few query rows: products are summed across vector lanes, four keys at a time.
 *
 * The positions of a sequence are processed in chunks of CHUNK, for all query heads of a key/value head; the softmax is
 * computed online (Milakov and Gimelshein 2018, arXiv 1805.02867).
 */
#pragma once
#include <math.h>

#include "attention.h"

#define CHUNK 64
#if LANES == 16 || defined(__aarch64__)
#define BLOCK 4 /* rows whose sums with four keys are in registers at once */
#else
#define BLOCK 3
#endif
#define MOST_VECTORS 8 /* of one row's columns at once */

/* The type in which queries are multiplied: float32, converted once, unless the CPU has dots of bfloat16. */
INLINE enum type query_type(enum type type) {
#ifdef HAS_BFLOAT16_DOT
    return type;
#else
    (void)type;
    return FLOAT32;
#endif
}

/* State of one query row between chunks. */
struct state {
    float most, total, rescale;
};

struct scratch {
    struct state *states;
    float *scores;  /* [rows, CHUNK], then weights in the same place */
    float *sums;    /* [rows, width of a sum] */
    float *queries; /* [rows, key width], if they are converted */
};

INLINE int64_t width_of_sum(const struct layer *l) { return (l->value_width + 63) / 64 * 64; }

/* Lay out the buffers for `rows` query rows in `memory`; returns their size in bytes. */
INLINE size_t place_rows(struct scratch *own, const struct layer *l, int64_t rows, char *memory) {
    own->scores = (float *)memory;
    own->sums = own->scores + rows * CHUNK;
    own->queries = own->sums + rows * width_of_sum(l);
    own->states = (struct state *)(own->queries + rows * l->key_width);
    return ((char *)(own->states + rows) - memory + LINE - 1) / LINE * LINE;
}

/* Scores of `rows` queries with four keys. */
INLINE void score(const char *const *query, const char *const *keys, const int rows, int64_t width, float *scores,
                  enum type type) {
    const int step = step_of(type);
    const size_t size = size_of(type), query_size = size_of(query_type(type));
    floats sums[BLOCK][4];
    UNROLL for (int r = 0; r < rows; r++)
        UNROLL for (int j = 0; j < 4; j++) sums[r][j] = (floats){0};
    int64_t k = 0;
    for (; k + step <= width; k += step) {
        floats q[BLOCK];
        UNROLL for (int r = 0; r < rows; r++) q[r] = load(query[r] + k * query_size, query_type(type));
        UNROLL for (int j = 0; j < 4; j++) {
            const floats key = in_register(load(keys[j] + k * size, type));
            UNROLL for (int r = 0; r < rows; r++) sums[r][j] = multiply_add(sums[r][j], q[r], key, type);
        }
    }
    if (k < width) {
        const int rest = (int)(width - k);
        UNROLL for (int j = 0; j < 4; j++) {
            const floats key = load_part(keys[j] + k * size, rest, type);
            UNROLL for (int r = 0; r < rows; r++) {
                const floats q = load_part(query[r] + k * query_size, rest, query_type(type));
                sums[r][j] = multiply_add(sums[r][j], q, key, type);
            }
        }
    }
    UNROLL for (int r = 0; r < rows; r++)
        sum_four(scores + r * CHUNK, sums[r][0], sums[r][1], sums[r][2], sums[r][3]);
}

/* Rows of the next block, of `left` ones: two smaller blocks rather than a whole one and a single row. */
INLINE int64_t next_block(int64_t left) { return left <= BLOCK ? left : left == BLOCK + 1 ? left / 2 : BLOCK; }

/* Scores of all rows of a head with a chunk of keys; prefetches the values. Past `count` the last key is repeated. */
INLINE void score_chunk(const struct layer *l, const char *const *query, int64_t rows, const char *const *keys,
                        const char *const *values, int64_t count, float *scores, enum type type) {
    const int64_t value_bytes = l->value_width * size_of(type);
    for (int64_t j = 0; j < count; j += 4) {
        const char *four[4];
        for (int i = 0; i < 4; i++) four[i] = keys[j + i < count ? j + i : count - 1];
        for (int i = 0; i < 4 && j + i < count; i++)
            for (int64_t at = 0; at < value_bytes; at += LINE) __builtin_prefetch(values[j + i] + at, 0, 2);
        for (int64_t r = 0, next; r < rows; r += next) {
            float *to = scores + r * CHUNK + j;
            switch (next = next_block(rows - r)) {
                case 1: score(query + r, four, 1, l->key_width, to, type); break;
                case 2: score(query + r, four, 2, l->key_width, to, type); break;
                case 3: score(query + r, four, 3, l->key_width, to, type); break;
                default: score(query + r, four, BLOCK, l->key_width, to, type);
            }
        }
    }
}

/* Replace scores by weights for a row that sees keys `low` .. `high` of the chunk. The row's own key is number `own`;
 * ALiBi lowers the scores of earlier ones by `slope` per token, and `relative`, if there, is added by distance. */
INLINE void weigh(const struct layer *l, struct state *state, float *scores, int64_t low, int64_t high, int64_t own,
                  float slope, const float *relative, enum type type) {
    state->rescale = 1;
    if (low >= high) {
        memset(scores, 0, CHUNK * sizeof *scores);
        return;
    }
    for (int j = 0; j < CHUNK; j += LANES) {
        floats s = load(scores + j, FLOAT32) * l->scaling;
        if (l->soft_cap != 0) s = tanh_of(s / l->soft_cap) * l->soft_cap;
        if (l->alibi)
            for (int i = 0; i < LANES; i++) s[i] += slope * (float)(j + i - own);
        memcpy(scores + j, &s, sizeof s);
    }
    if (relative)
        for (int64_t j = own - l->extent + 1 > low ? own - l->extent + 1 : low; j < high; j++)
            scores[j] += relative[own - j];
    for (int64_t j = 0; j < low; j++) scores[j] = -INFINITY;
    for (int64_t j = high; j < CHUNK; j++) scores[j] = -INFINITY;
    floats best = splat(-INFINITY), added = {0};
    for (int j = 0; j < CHUNK; j += LANES) best = larger_of(load(scores + j, FLOAT32), best);
    float most = state->most;
    for (int i = 0; i < LANES; i++) most = best[i] > most ? best[i] : most;
    for (int j = 0; j < CHUNK; j += LANES) {
        floats weight = exp_of(load(scores + j, FLOAT32) - most);
        added += weight;
        memcpy(scores + j, &weight, sizeof weight);
    }
    state->rescale = exp_of_one(state->most - most);
    state->total = state->total * state->rescale + sum_of_lanes(added);
    state->most = most;
#ifdef HAS_BFLOAT16_DOT
    if (type == BFLOAT16) /* pairs of weights, for products with pairs of values */
        for (int j = 0; j < CHUNK; j += 2 * LANES) {
            __m512bh pairs = _mm512_cvtne2ps_pbh(_mm512_loadu_ps(scores + j + LANES), _mm512_loadu_ps(scores + j));
            memcpy(scores + j / 2, &pairs, sizeof pairs);
        }
#endif
}

#ifdef HAS_BFLOAT16_DOT
/* sums = sums * rescale + weights times the values of `slices` times 32 columns, `rest` of which are there if it is not
 * 0. A sum holds the columns of a slice in the order in which two values' halves are interleaved. */
INLINE void add_pairs(const struct state *states, const float *weights, const char *const *values, int64_t count,
                      int64_t column, const int rows, const int slices, int rest, float *sums, int64_t sum_width,
                      const char *const *ahead) {
    __m512 low[BLOCK][2], high[BLOCK][2];
    UNROLL for (int r = 0; r < rows; r++)
        UNROLL for (int s = 0; s < slices; s++) {
            __m512 rescale = _mm512_set1_ps(states[r].rescale);
            const float *from = sums + r * sum_width + column + s * 32;
            low[r][s] = _mm512_mul_ps(_mm512_loadu_ps(from), rescale);
            high[r][s] = _mm512_mul_ps(_mm512_loadu_ps(from + 16), rescale);
        }
    for (int64_t j = 0; j < count; j += 2) {
        const char *first = values[j] + column * 2, *second = j + 1 < count ? values[j + 1] + column * 2 : NULL;
        if (ahead) {
            __builtin_prefetch(ahead[j] + column * 2, 0, 2);
            __builtin_prefetch(ahead[j + 1] + column * 2, 0, 2);
            if (slices == 2) {
                __builtin_prefetch(ahead[j] + column * 2 + LINE, 0, 2);
                __builtin_prefetch(ahead[j + 1] + column * 2 + LINE, 0, 2);
            }
        }
        UNROLL for (int s = 0; s < slices; s++) {
            floats none = {0};
            floats a = rest ? load_part(first, rest, BFLOAT16) : load(first + s * 64, BFLOAT16);
            floats b = !second ? none : rest ? load_part(second, rest, BFLOAT16) : load(second + s * 64, BFLOAT16);
            __m512bh lows = (__m512bh)_mm512_unpacklo_epi16((__m512i)a, (__m512i)b);
            __m512bh highs = (__m512bh)_mm512_unpackhi_epi16((__m512i)a, (__m512i)b);
            UNROLL for (int r = 0; r < rows; r++) {
                int pair;
                memcpy(&pair, weights + r * CHUNK + j / 2, sizeof pair);
                __m512bh weight = (__m512bh)_mm512_set1_epi32(pair);
                low[r][s] = _mm512_dpbf16_ps(low[r][s], lows, weight);
                high[r][s] = _mm512_dpbf16_ps(high[r][s], highs, weight);
            }
        }
    }
    UNROLL for (int r = 0; r < rows; r++)
        UNROLL for (int s = 0; s < slices; s++) {
            float *to = sums + r * sum_width + column + s * 32;
            _mm512_storeu_ps(to, low[r][s]);
            _mm512_storeu_ps(to + 16, high[r][s]);
        }
}
#endif

/* sums = sums * rescale + weights times `vectors` vectors of columns of the values. rest: columns that are there if not
 * all are, else 0. */
INLINE void add_columns(const struct state *states, const float *weights, const char *const *values, int64_t count,
                        int64_t column, const int rows, const int vectors, int rest, float *sums, int64_t sum_width,
                        const char *const *ahead, enum type type) {
    const size_t size = size_of(type);
    floats held[BLOCK][MOST_VECTORS];
    UNROLL for (int r = 0; r < rows; r++)
        UNROLL for (int v = 0; v < vectors; v++)
            held[r][v] = load(sums + r * sum_width + column + v * LANES, FLOAT32) * states[r].rescale;
    for (int64_t j = 0; j < count; j++) {
        const char *from = values[j] + column * size;
        if (ahead)
            for (size_t at = 0; at < vectors * LANES * size; at += LINE)
                __builtin_prefetch(ahead[j] + column * size + at, 0, 2);
        floats weight[BLOCK];
        UNROLL for (int r = 0; r < rows; r++) weight[r] = to_all_lanes(weights + r * CHUNK + j);
        UNROLL for (int v = 0; v < vectors; v++) {
            const char *at = from + v * LANES * size;
            const floats value = in_register(rest ? load_part(at, rest, type) : load(at, type));
            UNROLL for (int r = 0; r < rows; r++)
                held[r][v] = multiply_add(held[r][v], value, weight[r], FLOAT32);
        }
    }
    UNROLL for (int r = 0; r < rows; r++)
        UNROLL for (int v = 0; v < vectors; v++)
            memcpy(sums + r * sum_width + column + v * LANES, &held[r][v], sizeof held[r][v]);
}

INLINE void add_values(const struct layer *l, const struct scratch *own, int64_t row, const int rows,
                       const char *const *values, int64_t count, const char *const *ahead, enum type type) {
    const int64_t width = l->value_width, sum_width = width_of_sum(l);
    const struct state *states = own->states + row;
    const float *weights = own->scores + row * CHUNK;
    float *sums = own->sums + row * sum_width;
    int64_t column = 0;
#ifdef HAS_BFLOAT16_DOT
    if (type == BFLOAT16) {
        for (; column + 64 <= width; column += 64)
            add_pairs(states, weights, values, count, column, rows, 2, 0, sums, sum_width, ahead);
        for (; column + 32 <= width; column += 32)
            add_pairs(states, weights, values, count, column, rows, 1, 0, sums, sum_width, ahead);
        if (column < width)
            add_pairs(states, weights, values, count, column, rows, 1, (int)(width - column), sums, sum_width, ahead);
        return;
    }
#endif
    const int most = rows == 1 ? MOST_VECTORS : rows < 4 ? 4 : 2; /* as many sums as products are in flight */
    for (; column + most * LANES <= width; column += most * LANES)
        add_columns(states, weights, values, count, column, rows, most, 0, sums, sum_width, ahead, type);
    for (; column + LANES <= width; column += LANES)
        add_columns(states, weights, values, count, column, rows, 1, 0, sums, sum_width, ahead, type);
    if (column < width)
        add_columns(states, weights, values, count, column, rows, 1, (int)(width - column), sums, sum_width, ahead,
                    type);
}

#ifdef HAS_BFLOAT16_DOT
/* Undo the interleaving of a slice's columns (see `add_pairs`). */
INLINE void put_pairs(bfloat16 *to, const float *sums, int64_t width, float share) {
    const __m512i first = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
    const __m512i second = _mm512_add_epi32(first, _mm512_set1_epi32(8));
    for (int64_t column = 0; column < width; column += 32) {
        __m512 low = _mm512_mul_ps(_mm512_loadu_ps(sums + column), _mm512_set1_ps(share));
        __m512 high = _mm512_mul_ps(_mm512_loadu_ps(sums + column + 16), _mm512_set1_ps(share));
        __m512bh both = _mm512_cvtne2ps_pbh(_mm512_permutex2var_ps(low, second, high),
                                            _mm512_permutex2var_ps(low, first, high));
        uint64_t there = width - column < 32 ? (1ull << (width - column)) - 1 : 0xffffffff;
        _mm512_mask_storeu_epi16(to + column, (__mmask32)there, (__m512i)both);
    }
}
#endif

INLINE void put(const struct layer *l, const struct state *state, const float *sums, int64_t row, int64_t head,
                enum type type) {
    int64_t base = (row * l->heads * l->groups + head) * l->value_width;
    float share = 1 / state->total;
#ifdef HAS_BFLOAT16_DOT
    if (type == BFLOAT16) {
        put_pairs((bfloat16 *)l->output + base, sums, l->value_width, share);
        return;
    }
#endif
    for (int64_t column = 0; column < l->value_width; column++)
        if (type == FLOAT32)
            ((float *)l->output)[base + column] = sums[column] * share;
        else
            ((bfloat16 *)l->output)[base + column] = bfloat16_of(sums[column] * share);
}

/* A query in `query_type`, converted into `to` if it has another type. */
INLINE const char *converted(const char *query, int64_t width, float *to, enum type type) {
    if (query_type(type) == type) return query;
    for (int64_t k = 0; k < width; k += LANES) {
        const int64_t count = width - k < LANES ? width - k : LANES;
        const char *from = query + k * size_of(type);
        const floats part = count < LANES ? load_part(from, (int)count, type) : load(from, type);
        memcpy(to + k, &part, count * sizeof *to);
    }
    return (const char *)to;
}

/* The end of the chunk that contains `start`, at most `context`. */
static int64_t end_of_chunk(int64_t start, int64_t context) {
    int64_t end = start - start % CHUNK + CHUNK;
    return end < context ? end : context;
}

INLINE void point(const char **to, const char *base, const int64_t *slots, int64_t count, int64_t heads, int64_t head,
                  int64_t width, enum type type) {
    for (int64_t j = 0; j < count; j++) to[j] = base + (slots[j] * heads + head) * width * size_of(type);
    for (int64_t j = count; j < CHUNK; j++) to[j] = base; /* valid addresses for prefetching */
}

/* Queries `from` .. `from + length` of sequence s with key/value heads `first` .. `first + heads`. */
INLINE void attend_rows(const struct batch *b, const struct layer *l, int64_t s, int64_t from, int64_t length,
                        int64_t first, int64_t heads, char *memory, enum type type) {
    const int64_t context = b->contexts[s] - b->lengths[s] + from + length, row = b->rows[s] + from;
    const int64_t rows = length * l->groups, sum_width = width_of_sum(l);
    struct scratch scratch, *own = &scratch;
    place_rows(own, l, heads * rows, memory);
    const char *queries[heads * rows];
    for (int64_t i = 0; i < heads * rows; i++) {
        const int64_t token = row + i % rows / l->groups;
        const int64_t head = first * l->groups + i / rows * l->groups + i % l->groups;
        const char *query = l->query + (token * l->row_stride + head * l->head_stride) * size_of(type);
        queries[i] = converted(query, l->key_width, own->queries + i * l->key_width, type);
        own->states[i] = l->sinks ? (struct state){sink_of(l, token, head), 1, 1} : (struct state){-INFINITY, 0, 1};
    }
    memset(own->sums, 0, heads * rows * sum_width * sizeof *own->sums);
    int64_t buffers[2][CHUNK], *slots = buffers[0], *next = buffers[1];
    int64_t start = first_visible(l, context - length);
    int64_t count = find(b, s, start, end_of_chunk(start, context), slots);
    while (count) {
        int64_t after = start + count, next_count = find(b, s, after, end_of_chunk(after, context), next);
        for (int64_t h = 0; h < heads; h++) {
            const char *keys[CHUNK], *values[CHUNK], *ahead[CHUNK];
            const int same = h + 1 < heads;
            struct scratch mine = {own->states + h * rows, own->scores, own->sums + h * rows * sum_width, NULL};
            point(keys, l->keys, slots, count, l->heads, first + h, l->key_width, type);
            point(values, l->values, slots, count, l->heads, first + h, l->value_stride, type);
            point(ahead, l->keys, same ? slots : next, same ? count : next_count, l->heads,
                  same ? first + h + 1 : first, l->key_width, type);
            score_chunk(l, queries + h * rows, rows, keys, values, count, mine.scores, type);
            for (int64_t i = 0; i < rows; i++) {
                int64_t position = context - length + i / l->groups;
                int64_t low = first_visible(l, position) - start, high = position + 1 - start;
                const int64_t head = (first + h) * l->groups + i % l->groups;
                const float *relative = l->relative ? relative_of(l, row + i / l->groups, head) : NULL;
                weigh(l, mine.states + i, mine.scores + i * CHUNK, low < 0 ? 0 : low, high < count ? high : count,
                      position - start, l->alibi ? l->alibi[head] : 0, relative, type);
            }
            for (int64_t r = 0, taken; r < rows; r += taken) {
                const char *const *fetched = r ? NULL : ahead;
                switch (taken = next_block(rows - r)) {
                    case 1: add_values(l, &mine, r, 1, values, count, fetched, type); break;
                    case 2: add_values(l, &mine, r, 2, values, count, fetched, type); break;
                    case 3: add_values(l, &mine, r, 3, values, count, fetched, type); break;
                    default: add_values(l, &mine, r, BLOCK, values, count, fetched, type);
                }
            }
        }
        int64_t *seen = slots;
        start = after, count = next_count, slots = next, next = seen;
    }
    for (int64_t i = 0; i < heads * rows; i++)
        put(l, own->states + i, own->sums + i * sum_width, row + i % rows / l->groups,
            (first + i / rows) * l->groups + i % l->groups, type);
}
