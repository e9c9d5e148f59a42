/* Arguments of the attention kernels: sequences, cache, and which keys each query sees. */
#pragma once
#include "vector.h"

struct batch { /* sequences; their tokens are rows of the query */
    int64_t count, table_stride, block_size;
    const int64_t *rows, *lengths, *contexts; /* first row of the query, tokens there, tokens in the cache */
    const int64_t *sequences, *tables;        /* row of each sequence in the block tables, and the tables */
};

struct layer {
    const char *query, *keys, *values; /* [T, Hq, d], [slots, Hkv, d], [slots, Hkv, dv] */
    char *output;                      /* [T, Hq, dv] */
    const float *sinks;                /* [Hq] or [T, Hq], or null */
    const float *alibi;                /* [Hq], slopes, or null */
    const float *relative;             /* [T, Hq, extent], added to scores by distance, or null */
    int64_t row_stride, head_stride;   /* of the query, in elements */
    int64_t heads, groups, key_width, value_width;
    int64_t value_stride;      /* from one value to the next, in elements */
    int64_t window, chunk;     /* 0: none */
    int64_t sink_row, extent;  /* from one token's sinks to the next, 0: the same for all; of `relative` */
    float scaling, soft_cap;   /* soft_cap 0: none */
};

/* The sink of a row of the batch and a query head. */
static float sink_of(const struct layer *l, int64_t row, int64_t head) { return l->sinks[row * l->sink_row + head]; }

/* What a row of the batch and a query head add to scores, by distance. */
static const float *relative_of(const struct layer *l, int64_t row, int64_t head) {
    return l->relative + (row * l->heads * l->groups + head) * l->extent;
}

static int64_t first_visible(const struct layer *l, int64_t position) {
    int64_t first = 0;
    if (l->window && position - l->window + 1 > first) first = position - l->window + 1;
    if (l->chunk && position - position % l->chunk > first) first = position - position % l->chunk;
    return first;
}

/* Cache slots of the tokens `start` .. `end` of sequence s; returns their number. */
static int64_t find(const struct batch *b, int64_t s, int64_t start, int64_t end, int64_t *slots) {
    const int64_t *table = b->tables + b->sequences[s] * b->table_stride;
    int64_t block = start / b->block_size, offset = start % b->block_size;
    for (int64_t i = 0; i < end - start; i++) {
        slots[i] = table[block] * b->block_size + offset;
        if (++offset == b->block_size) offset = 0, block++;
    }
    return end > start ? end - start : 0;
}
