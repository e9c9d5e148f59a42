/* Attention for a dozen query rows or more. Each vector lane holds one query row, so no sum crosses lanes.
 *
 * A unit is one float32, or two bfloat16 where products take pairs. A task transposes its queries once. From every chunk
 * of the cache it copies the keys and reorders the values, for all its rows. Scores, softmax and sums are then computed
 * in tiles of a few vectors of rows. Chunks begin at multiples of KEYS and masked keys add nothing, so a row's result
 * depends neither on its task nor on its tile.
 */
#pragma once
#include <float.h>
#include <math.h>

#include "attention.h"

#define KEYS 64        /* of a chunk */
#define TILE_VECTORS 3 /* of rows */
#if LANES == 16
#define PANEL 8 /* keys, or columns of values, at a time; their sums fill the registers */
#else
#define PANEL 4
#endif

/* The query rows of a task with one key/value head; a row is a token's query head. */
struct tiles {
    int64_t head;                       /* the key/value head */
    int64_t rows, vectors, count;       /* rows, vectors of them, tiles */
    int64_t key_units, key_stride;      /* of a key, and from one copied key to the next */
    int64_t columns, most_columns;      /* of a sum, without and with padding to whole vectors */
    float *queries;                     /* [tile][key_units][its rows] */
    float *keys, *values;               /* [KEYS][key_stride], [columns / PANEL][units of KEYS][PANEL] */
    float *scores;                      /* [KEYS][rows of a tile]; then weights, [units of KEYS][rows of a tile] */
    float *sums;                        /* [tile][most_columns][its rows] */
    float *best;                        /* [row of a tile]: maximum score of a chunk */
    float *most, *total;                /* [row]: running maximum score, running sum of weights */
    int32_t *low, *high;                /* [row]: the range of positions that it sees */
    float *slopes;                      /* [row]: ALiBi per token, to base 2 */
    const float **relative;             /* [row]: logits by distance, to base e */
};

/* Elements per unit. */
INLINE int numbers_of(enum type type) { return step_of(type) / LANES; }

INLINE int64_t round_up(int64_t count, int64_t step) { return (count + step - 1) / step * step; }

/* Lay out the buffers for `rows` query rows in `memory`, aligned to LINE; returns their size in bytes. */
INLINE size_t place_tiles(struct tiles *t, const struct layer *l, int64_t rows, char *memory, enum type type) {
    const int64_t numbers = numbers_of(type);
    t->rows = rows, t->vectors = (rows + LANES - 1) / LANES, t->count = (t->vectors + TILE_VECTORS - 1) / TILE_VECTORS;
    t->key_units = (l->key_width + numbers - 1) / numbers, t->key_stride = round_up(t->key_units, LANES);
    t->columns = round_up(l->value_width, PANEL), t->most_columns = round_up(l->value_width, numbers * LANES);
    const int64_t lanes = t->vectors * LANES;
    float **places[] = {&t->queries, &t->keys, &t->values, &t->scores, &t->best, &t->sums, &t->most,
                        &t->total, (float **)&t->low, (float **)&t->high, &t->slopes, (float **)&t->relative};
    const int64_t sizes[] = {t->key_units * lanes, KEYS * t->key_stride, KEYS / numbers * t->most_columns,
                             KEYS * TILE_VECTORS * LANES, TILE_VECTORS * LANES, t->most_columns * lanes, lanes, lanes,
                             lanes, lanes, l->alibi ? lanes : 0,
                             l->relative ? lanes * (int64_t)sizeof *t->relative / (int64_t)sizeof(float) : 0};
    size_t used = 0;
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++) {
        *places[i] = (float *)(memory + used);
        used += round_up(sizes[i] * sizeof(float), LINE);
    }
    return used;
}

/* The first vector of a tile; tiles are of nearly equal size. */
INLINE int64_t first_vector(const struct tiles *t, int64_t tile) { return t->vectors * tile / t->count; }

/* -- layout of queries, keys and values ------------------------------------------------------------------------ */

/* Up to LANES units of a row of `width` elements from element `at` on; zero past its end. */
INLINE floats load_units(const char *row, int64_t at, int64_t width, enum type type) {
    const char *from = row + at * size_of(type);
    return width - at < step_of(type) ? load_part(from, (int)(width - at), type) : load(from, type);
}

/* Transpose the queries of the tokens from row `row` of the batch on. */
INLINE void transpose_queries(const struct tiles *t, const struct layer *l, int64_t row, enum type type) {
    for (int64_t tile = 0; tile < t->count; tile++) {
        const int64_t first = first_vector(t, tile), vectors = first_vector(t, tile + 1) - first;
        float *to = t->queries + first * LANES * t->key_units;
        for (int64_t v = 0; v < vectors; v++)
            for (int64_t k = 0; k < t->key_units; k += LANES) {
                floats square[LANES];
                for (int64_t i = 0; i < LANES; i++) {
                    const int64_t at = (first + v) * LANES + i, token = row + at / l->groups;
                    const int64_t own = t->head * l->groups + at % l->groups;
                    const char *query = l->query + (token * l->row_stride + own * l->head_stride) * size_of(type);
                    square[i] = (floats){0};
                    if (at < t->rows) square[i] = load_units(query, k * numbers_of(type), l->key_width, type);
                }
                transpose_square(square);
                for (int64_t i = 0; i < LANES && k + i < t->key_units; i++)
                    memcpy(to + ((k + i) * vectors + v) * LANES, &square[i], sizeof *square);
            }
    }
}

/* Store a vector of units of values, from `column` on, in its panels. */
INLINE void put_values(const struct tiles *t, int64_t unit, int64_t column, floats units, enum type type) {
    for (int64_t i = 0; i < LANES; i += PANEL) {
        float *to = t->values + ((column + i) * (KEYS / numbers_of(type)) + unit * PANEL);
        memcpy(to, (const char *)&units + i * sizeof(float), PANEL * sizeof(float));
    }
}

/* Copy the keys and values of a chunk, those from `low` on at `slots`; zeros pad to whole panels. */
INLINE void order_chunk(const struct tiles *t, const struct layer *l, const int64_t *slots, int64_t low, int64_t high,
                        enum type type) {
    const int numbers = numbers_of(type);
    for (int64_t j = low / PANEL * PANEL; j < round_up(high, PANEL); j += numbers) {
        const char *values[2] = {NULL, NULL};
        for (int64_t i = 0; i < numbers; i++) {
            float *to = t->keys + (j + i) * t->key_stride;
            if (j + i < low || j + i >= high) {
                memset(to, 0, t->key_stride * sizeof *to);
                continue;
            }
            const int64_t place = slots[j + i - low] * l->heads + t->head;
            const char *key = l->keys + place * l->key_width * size_of(type);
            values[i] = l->values + place * l->value_stride * size_of(type);
            for (int64_t k = 0; k < l->key_width; k += step_of(type)) {
                floats units = load_units(key, k, l->key_width, type);
                memcpy(to + k / numbers, &units, sizeof units);
            }
        }
        for (int64_t column = 0; column < l->value_width; column += step_of(type)) {
            floats rows[2];
            for (int i = 0; i < numbers; i++)
                rows[i] = values[i] ? load_units(values[i], column, l->value_width, type) : (floats){0};
#ifdef HAS_BFLOAT16_DOT
            if (type == BFLOAT16) {
                floats both[2];
                interleave(rows[0], rows[1], both);
                put_values(t, j / 2, column, both[0], type);
                put_values(t, j / 2, column + LANES, both[1], type);
                continue;
            }
#endif
            put_values(t, j, column, rows[0], type);
        }
    }
}

/* Prefetching of the next chunk's keys and values during the computation of this chunk. */
struct ahead {
    const int64_t *slots;
    int64_t next, count, share; /* next to prefetch, total, number at a time */
};

INLINE void fetch(struct ahead *ahead, const struct tiles *t, const struct layer *l, enum type type) {
    const int64_t until = ahead->next + ahead->share < ahead->count ? ahead->next + ahead->share : ahead->count;
    for (; ahead->next < until; ahead->next++) {
        const int64_t place = ahead->slots[ahead->next] * l->heads + t->head, size = size_of(type);
        const char *key = l->keys + place * l->key_width * size, *value = l->values + place * l->value_stride * size;
        for (int64_t at = 0; at < l->key_width * size; at += LINE) __builtin_prefetch(key + at, 0, 2);
        for (int64_t at = 0; at < l->value_width * size; at += LINE) __builtin_prefetch(value + at, 0, 2);
    }
}

/* -- a tile with a chunk --------------------------------------------------------------------------------------- */

/* held[i][v] += sent[i * stride] * rows[v], over `count` units; those of `sent` are `step` apart. */
INLINE void multiply(floats held[PANEL][TILE_VECTORS], const int vectors, const float *sent, int64_t stride,
                     int64_t step, const float *rows, int64_t count, enum type type) {
    for (int64_t k = 0; k < count; k++, sent += step, rows += vectors * LANES) {
        floats row[TILE_VECTORS];
        UNROLL for (int v = 0; v < vectors; v++) row[v] = in_register(load(rows + v * LANES, FLOAT32));
        UNROLL for (int i = 0; i < PANEL; i++) {
            floats all = to_all_lanes(sent + i * stride);
            UNROLL for (int v = 0; v < vectors; v++) held[i][v] = multiply_add(held[i][v], row[v], all, type);
        }
    }
}

/* Scores of a tile's queries with keys `begin` .. `end`, times `factor`, and the maximum of each row. */
INLINE void score_tile(const struct tiles *t, const struct layer *l, const float *queries, const int vectors,
                       int64_t begin, int64_t end, float factor, struct ahead *ahead, enum type type) {
    for (int i = 0; i < vectors * LANES; i++) t->best[i] = -FLT_MAX;
    for (int64_t j = begin; j < end; j += PANEL) {
        fetch(ahead, t, l, type);
        floats held[PANEL][TILE_VECTORS];
        UNROLL for (int i = 0; i < PANEL; i++)
            UNROLL for (int v = 0; v < vectors; v++) held[i][v] = (floats){0};
        multiply(held, vectors, t->keys + j * t->key_stride, t->key_stride, 1, queries, t->key_units, type);
        UNROLL for (int v = 0; v < vectors; v++) {
            floats best = load(t->best + v * LANES, FLOAT32);
            UNROLL for (int i = 0; i < PANEL; i++) {
                const floats score = held[i][v] * factor;
                best = larger_of(score, best);
                memcpy(t->scores + ((j + i) * vectors + v) * LANES, &score, sizeof score);
            }
            memcpy(t->best + v * LANES, &best, sizeof best);
        }
    }
}

INLINE void cap(float *scores, const struct layer *l) {
    const floats capped = tanh_of(load(scores, FLOAT32)) * (l->soft_cap * LOG2_E);
    memcpy(scores, &capped, sizeof capped);
}

/* Apply the soft cap to scores that were divided by it. */
INLINE void cap_tile(const struct tiles *t, const struct layer *l, const int vectors, int64_t begin, int64_t end) {
    for (int64_t i = begin * vectors; i < end * vectors; i++) cap(t->scores + i * LANES, l);
    for (int v = 0; v < vectors; v++) cap(t->best + v * LANES, l);
}

/* Lower the scores of positions from `start` on by the row's slope times their distance; the maximum of each row. */
INLINE void slope_tile(const struct tiles *t, int64_t row, const int vectors, int64_t start, int64_t begin, int64_t end) {
    for (int v = 0; v < vectors; v++) {
        integers last;
        memcpy(&last, t->high + row + v * LANES, sizeof last);
        const floats slope = load(t->slopes + row + v * LANES, FLOAT32);
        floats best = splat(-FLT_MAX);
        for (int64_t j = begin; j < end; j++) {
            float *at = t->scores + (j * vectors + v) * LANES;
            const integers distance = (integers){0} + (int32_t)(start + j + 1) - last;
            const floats score = load(at, FLOAT32) + slope * __builtin_convertvector(distance, floats);
            best = larger_of(score, best);
            memcpy(at, &score, sizeof score);
        }
        memcpy(t->best + v * LANES, &best, sizeof best);
    }
}

/* Add each row's logits by distance to the scores of positions from `start` on; the maximum of each row. */
INLINE void relate_tile(const struct tiles *t, const struct layer *l, int64_t row, const int vectors, int64_t start,
                        int64_t begin, int64_t end) {
    for (int64_t lane = 0; lane < vectors * LANES; lane++) {
        const int64_t own = t->high[row + lane] - 1 - start; /* the row's own key */
        const float *relative = t->relative[row + lane];
        float *scores = t->scores + lane, best = -FLT_MAX;
        const int64_t first = own - l->extent + 1 > begin ? own - l->extent + 1 : begin;
        const int64_t last = own + 1 < end ? own + 1 : end;
        for (int64_t j = first; j < last; j++) scores[j * vectors * LANES] += relative[own - j] * LOG2_E;
        for (int64_t j = begin; j < end; j++)
            if (scores[j * vectors * LANES] > best) best = scores[j * vectors * LANES];
        t->best[lane] = best;
    }
}

/* Mask the scores of positions from `start` on that a row does not see; the maximum of the others. */
INLINE void hide(const struct tiles *t, const int32_t *low, const int32_t *high, const int vectors, int64_t start,
                 int64_t begin, int64_t end) {
    const integers none = (integers)splat(-INFINITY);
    UNROLL for (int v = 0; v < vectors; v++) {
        integers first, last, score;
        memcpy(&first, low + v * LANES, sizeof first);
        memcpy(&last, high + v * LANES, sizeof last);
        floats best = splat(-FLT_MAX);
        for (int64_t j = begin; j < end; j++) {
            const integers position = (integers){0} + (int32_t)(start + j);
            const integers seen = (position >= first) & (position < last);
            float *at = t->scores + (j * vectors + v) * LANES;
            memcpy(&score, at, sizeof score);
            score = (score & seen) | (none & ~seen);
            best = larger_of((floats)score, best);
            memcpy(at, &score, sizeof score);
        }
        memcpy(t->best + v * LANES, &best, sizeof best);
    }
}

/* Replace scores by weights, 2^(score - running maximum). Sums so far must be multiplied by `rescale`. */
INLINE void weigh_tile(const struct tiles *t, int64_t row, const int vectors, int64_t begin, int64_t end,
                       floats rescale[TILE_VECTORS], enum type type) {
    float *most = t->most + row, *total = t->total + row, *scores = t->scores;
    floats now[TILE_VECTORS], added[TILE_VECTORS];
    UNROLL for (int v = 0; v < vectors; v++) {
        now[v] = larger_of(load(t->best + v * LANES, FLOAT32), load(most + v * LANES, FLOAT32));
        rescale[v] = exp2_of(load(most + v * LANES, FLOAT32) - now[v], FLOAT32);
        added[v] = load(total + v * LANES, FLOAT32) * rescale[v];
        memcpy(most + v * LANES, &now[v], sizeof now[v]);
    }
    for (int64_t j = begin; j < end; j += numbers_of(type))
        UNROLL for (int v = 0; v < vectors; v++) {
            const float *from = scores + (j * vectors + v) * LANES;
            floats weight = exp2_of(load(from, FLOAT32) - now[v], type);
            added[v] += weight;
#ifdef HAS_BFLOAT16_DOT
            if (type == BFLOAT16) {
                floats second = exp2_of(load(from + vectors * LANES, FLOAT32) - now[v], type);
                added[v] += second;
                weight = pair_up(weight, second);
            }
#endif
            memcpy(scores + (j / numbers_of(type) * vectors + v) * LANES, &weight, sizeof weight);
        }
    UNROLL for (int v = 0; v < vectors; v++) memcpy(total + v * LANES, &added[v], sizeof added[v]);
}

/* sums = sums * rescale + weights times values `begin` .. `end`. */
INLINE void add_tile(const struct tiles *t, const struct layer *l, float *sums, const int vectors, int64_t begin,
                     int64_t end, struct ahead *ahead, const floats rescale[TILE_VECTORS], enum type type) {
    const int64_t units = KEYS / numbers_of(type), first = begin / numbers_of(type);
    for (int64_t column = 0; column < t->columns; column += PANEL) {
        fetch(ahead, t, l, type);
        float *to = sums + column * vectors * LANES;
        floats held[PANEL][TILE_VECTORS];
        UNROLL for (int i = 0; i < PANEL; i++)
            UNROLL for (int v = 0; v < vectors; v++)
                held[i][v] = load(to + (i * vectors + v) * LANES, FLOAT32) * rescale[v];
        multiply(held, vectors, t->values + column * units + first * PANEL, 1, PANEL,
                 t->scores + first * vectors * LANES, end / numbers_of(type) - first, type);
        UNROLL for (int i = 0; i < PANEL; i++)
            UNROLL for (int v = 0; v < vectors; v++)
                memcpy(to + (i * vectors + v) * LANES, &held[i][v], sizeof held[i][v]);
    }
}

/* Attend from the rows of a tile to the chunk that begins at position `start`. */
INLINE void attend_tile(const struct layer *l, const struct tiles *t, int64_t first, const int vectors, int64_t start,
                        struct ahead *ahead, enum type type) {
    const int64_t row = first * LANES, lanes = vectors * LANES;
    const int32_t *low = t->low + row, *high = t->high + row; /* both ascend */
    const int64_t begin = low[0] > start ? (low[0] - start) / PANEL * PANEL : 0;
    const int64_t end = high[lanes - 1] - start < KEYS ? round_up(high[lanes - 1] - start, PANEL) : KEYS;
    if (begin >= end) return;
    const float factor = l->soft_cap != 0 ? l->scaling / l->soft_cap : l->scaling * LOG2_E;
    floats rescale[TILE_VECTORS];
    score_tile(t, l, t->queries + row * t->key_units, vectors, begin, end, factor, ahead, type);
    if (l->soft_cap != 0) cap_tile(t, l, vectors, begin, end);
    if (l->alibi) slope_tile(t, row, vectors, start, begin, end);
    if (l->relative) relate_tile(t, l, row, vectors, start, begin, end);
    if (low[lanes - 1] > start + begin || high[0] < start + end)
        hide(t, low, high, vectors, start, begin, end);
    weigh_tile(t, row, vectors, begin, end, rescale, type);
    add_tile(t, l, t->sums + row * t->most_columns, vectors, begin, end, ahead, rescale, type);
}

/* -- a task ---------------------------------------------------------------------------------------------------- */

/* Initialise the state before the first chunk; the first token is at `position`, its queries in `first` of the batch. */
static void begin_tiles(const struct tiles *t, const struct layer *l, int64_t position, int64_t first) {
    memset(t->sums, 0, t->vectors * LANES * t->most_columns * sizeof *t->sums);
    for (int64_t i = 0; i < t->vectors * LANES; i++) {
        const int64_t row = i < t->rows ? i : t->rows - 1, own = position + row / l->groups;
        const int64_t head = t->head * l->groups + row % l->groups, token = first + row / l->groups;
        t->low[i] = (int32_t)first_visible(l, own), t->high[i] = (int32_t)own + 1;
        t->most[i] = l->sinks ? sink_of(l, token, head) * LOG2_E : -FLT_MAX;
        t->total[i] = l->sinks ? 1 : 0;
        if (l->alibi) t->slopes[i] = l->alibi[head] * LOG2_E;
        if (l->relative) t->relative[i] = relative_of(l, token, head);
    }
}

/* Store columns `column` .. of a row in its output; `units` lanes hold them. */
INLINE void put_columns(const struct layer *l, int64_t row, int64_t head, int64_t column, floats units,
                        enum type type) {
    const int64_t at = (row * l->heads * l->groups + head) * l->value_width + column;
    const int64_t left = l->value_width - column, count = left < step_of(type) ? left : step_of(type);
    char *to = l->output + at * size_of(type);
#ifndef HAS_BFLOAT16_DOT
    if (type == BFLOAT16) {
        for (int64_t i = 0; i < count; i++) ((bfloat16 *)to)[i] = bfloat16_of(units[i]);
        return;
    }
#endif
    if (count == step_of(type))
        memcpy(to, &units, sizeof units);
    else
        memcpy(to, &units, count * size_of(type));
}

/* Store the outputs, after the last chunk, of the tokens from row `row` of the batch on. */
INLINE void put_tiles(const struct tiles *t, const struct layer *l, int64_t row, enum type type) {
    for (int64_t tile = 0; tile < t->count; tile++) {
        const int64_t first = first_vector(t, tile), lanes = (first_vector(t, tile + 1) - first) * LANES;
        for (int64_t lane = 0; lane < lanes; lane += LANES) {
            const int64_t own = first * LANES + lane;
            const floats share = 1.0f / load(t->total + own, FLOAT32);
            const float *from = t->sums + first * LANES * t->most_columns + lane;
            for (int64_t column = 0; column < l->value_width; column += step_of(type)) {
                floats square[LANES];
                for (int64_t i = 0; i < LANES; i++) {
                    const float *sums = from + (column + i * numbers_of(type)) * lanes;
                    square[i] = load(sums, FLOAT32) * share;
#ifdef HAS_BFLOAT16_DOT
                    if (type == BFLOAT16) square[i] = pair_up(square[i], load(sums + lanes, FLOAT32) * share);
#endif
                }
                transpose_square(square);
                for (int64_t i = 0; i < LANES && own + i < t->rows; i++)
                    put_columns(l, row + (own + i) / l->groups, t->head * l->groups + (own + i) % l->groups,
                                column, square[i], type);
            }
        }
    }
}

/* Queries `from` .. `from + length` of sequence s with key/value head `head`. */
INLINE void attend_tiles(const struct batch *b, const struct layer *l, int64_t s, int64_t from, int64_t length,
                         int64_t head, char *memory, enum type type) {
    const int64_t position = b->contexts[s] - b->lengths[s] + from, context = position + length;
    struct tiles t;
    place_tiles(&t, l, length * l->groups, memory, type);
    t.head = head;
    const int64_t steps = (KEYS + t.columns) / PANEL, share = (KEYS + steps - 1) / steps;
    int64_t buffers[2][KEYS], *slots = buffers[0], *next = buffers[1];
    int64_t low = first_visible(l, position), high = low / KEYS * KEYS + KEYS;
    high = high < context ? high : context;
    find(b, s, low, high, slots);
    fetch(&(struct ahead){slots, 0, high - low, KEYS}, &t, l, type);
    begin_tiles(&t, l, position, b->rows[s] + from);
    transpose_queries(&t, l, b->rows[s] + from, type);
    while (low < high) {
        const int64_t start = low / KEYS * KEYS, after = high + KEYS < context ? high + KEYS : context;
        find(b, s, high, after, next);
        order_chunk(&t, l, slots, low - start, high - start, type);
        struct ahead ahead = {next, 0, after - high, share};
        for (int64_t tile = 0; tile < t.count; tile++) {
            const int64_t first = first_vector(&t, tile);
            switch (first_vector(&t, tile + 1) - first) {
                case 1: attend_tile(l, &t, first, 1, start, &ahead, type); break;
                case 2: attend_tile(l, &t, first, 2, start, &ahead, type); break;
                default: attend_tile(l, &t, first, TILE_VECTORS, start, &ahead, type);
            }
        }
        int64_t *seen = slots;
        low = high, high = after, slots = next, next = seen;
    }
    put_tiles(&t, l, b->rows[s] + from, type);
}
