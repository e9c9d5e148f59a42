/* Panels of a quantised weight: some outputs and some segments of inputs, as `dot` takes them.
 *
 * The weight is read as it is stored. Squares of words are transposed in registers, so that a vector holds words of as
 * many outputs, and scales are transposed alike: then each lane sums one output.
 */
#pragma once
#include "integer_dots.h"
#include "stored_weights.h"

#define VECTORS 2 /* of outputs */
#define OUTPUTS (VECTORS * LANES)
#define PANEL_INPUTS 512 /* at most: the panel stays in the L1 cache */
#define PANEL_SEGMENTS 64
#define PANEL_WORDS (PANEL_INPUTS / 2 + 2 * PANEL_SEGMENTS)
#define ROW_BYTES (PANEL_INPUTS + 2 * LINE) /* of a row of `bytes` */

/* How the inputs of a whole product are cut: the operands of segment s are numbers first[s] .. first[s + 1]. */
struct cut {
    const struct segment *segments;
    int64_t *first;
    int64_t count;
    enum kind kind;
    int64_t in_place;     /* words are read from the weight, not from `bytes` */
    int64_t of_one_group; /* each segment is the group with its number */
};

struct panel {
    uint32_t *operands;      /* [operands][OUTPUTS] */
    float *scales, *minima;  /* [segments][OUTPUTS]; minima: what a code of zero means */
    int8_t *bytes;           /* [OUTPUTS][ROW_BYTES], if the weight is expanded first */
};

/* `first` has room for one number more than there are segments. */
static struct cut cut_of(const struct stored *w, const struct segment *segments, int64_t count, int64_t *first) {
    const int is_packed = w->values == PACKED && reading_of(w) == NIBBLE_WORDS;
    int even = HAS_NIBBLES && is_packed;
    for (int64_t s = 0; s < count; s++) even &= segments[s].start % 8 == 0;
    const enum kind kind = even ? NIBBLES : BYTES;
    first[0] = 0;
    for (int64_t s = 0; s < count; s++) {
        const int64_t length = segments[s].stop - segments[s].start, step = inputs_of(kind);
        first[s + 1] = first[s] + (length + step - 1) / step * operands_of(kind);
    }
    const int in_place = kind == NIBBLES || (w->values == INT8 && w->code_input == 1);
    return (struct cut){segments, first, count, kind, in_place, w->group_size && w->segment % w->group_size == 0};
}

/* How many segments from `s` on make a panel. */
INLINE int64_t panel_end(const struct cut *cut, int64_t s) {
    int64_t end = s + 1;
    const int64_t start = cut->segments[s].start;
    while (end < cut->count && end - s < PANEL_SEGMENTS && cut->segments[end].stop - start <= PANEL_INPUTS) end++;
    return end;
}

/* One segment of LANES outputs: `rows` are where its words begin, `count` its bytes; `ahead`: to what is read next. */
INLINE void put_operands(const char *const rows[LANES], int64_t count, int64_t ahead, enum kind kind, uint32_t *to) {
    const int operands = operands_of(kind);
    for (int64_t k = 0; k < count; k += LANES * 4) {
        floats square[LANES];
        UNROLL for (int i = 0; i < LANES; i++) {
            square[i] = (floats)load_bytes(rows[i] + k, count - k);
            __builtin_prefetch(rows[i] + k + ahead, 0, 2);
        }
        transpose_square(square);
        const int64_t left = (count - k + 3) / 4;
        UNROLL for (int i = 0; i < LANES; i++) {
            words found[2];
            if (i >= left) break;
            unpack((words)square[i], kind, found);
            for (int o = 0; o < operands; o++, to += OUTPUTS) memcpy(to, &found[o], sizeof found[o]);
        }
    }
}

/* The operands of segments s .. end of outputs n .. n + count. */
static void fill_operands(const struct stored *w, const struct cut *cut, int64_t n, int64_t count, int64_t s,
                          int64_t end, const struct panel *to) {
    const int64_t start = cut->segments[s].start, per_byte = cut->kind == NIBBLES ? 2 : 1;
    if (!cut->in_place) expand_rows(w, n, count, cut->segments + s, end - s, to->bytes - start, ROW_BYTES);
    const char *base = cut->in_place ? w->codes + n * w->code_output : (const char *)to->bytes - start;
    const int64_t step = cut->in_place ? w->code_output : ROW_BYTES, ahead = cut->in_place ? OUTPUTS * step : 0;
    for (int v = 0; v < VECTORS; v++)
        for (int64_t at = s; at < end; at++) {
            const struct segment *segment = &cut->segments[at];
            const char *rows[LANES];
            for (int64_t i = 0; i < LANES; i++) {
                const int64_t row = v * LANES + i; /* outputs beyond the last are read as the last */
                rows[i] = base + (row < count ? row : count - 1) * step + segment->start / per_byte;
            }
            uint32_t *operands = to->operands + (cut->first[at] - cut->first[s]) * OUTPUTS + v * LANES;
            const int64_t length = segment->stop - segment->start;
            if (HAS_NIBBLES && cut->kind == NIBBLES)
                put_operands(rows, (length + 7) / 8 * 4, ahead, NIBBLES, operands);
            else
                put_operands(rows, length, ahead, BYTES, operands);
        }
}

/* LANES scales and as many zero points in bfloat16, one word for two; of `count` groups at most. */
INLINE floats load_groups(const bfloat16 *scales, const bfloat16 *zeros, int64_t count) {
    bfloat16 both[2 * LANES] = {0};
    if (count >= LANES) {
        memcpy(both, scales, LANES * sizeof *both), memcpy(both + LANES, zeros, LANES * sizeof *both);
    } else {
        memcpy(both, scales, count * sizeof *both), memcpy(both + LANES, zeros, count * sizeof *both);
    }
    floats result;
    memcpy(&result, both, sizeof result);
    return result;
}

/* Scales and zero points in bfloat16, one of each per segment, in squares. */
static void turn_groups(const struct stored *w, int64_t n, int64_t count, int64_t s, int64_t end,
                        const struct panel *to) {
    for (int v = 0; v < VECTORS; v++)
        for (int64_t at = s; at < end; at += LANES) {
            floats square[LANES];
            for (int64_t i = 0; i < LANES; i++) {
                const int64_t row = n + (v * LANES + i < count ? v * LANES + i : count - 1);
                square[i] = load_groups((const bfloat16 *)w->scales + row * w->scale_output + at,
                                        (const bfloat16 *)w->zeros + row * w->zero_output + at, end - at);
            }
            transpose_square(square);
            for (int i = 0; i < LANES && at + i < end; i++) {
                const words two = (words)square[i / 2], other = (words)square[LANES / 2 + i / 2];
                const floats scale = (floats)(i % 2 ? two & 0xffff0000 : two << 16);
                const floats minimum = -scale * (floats)(i % 2 ? other & 0xffff0000 : other << 16);
                const int64_t place = (at + i - s) * OUTPUTS + v * LANES;
                memcpy(to->scales + place, &scale, sizeof scale), memcpy(to->minima + place, &minimum, sizeof minimum);
            }
        }
}

/* The scales of segments s .. end of outputs n .. n + count, and what codes of zero mean. */
static void fill_scales(const struct stored *w, const struct cut *cut, int64_t n, int64_t count, int64_t s, int64_t end,
                        const struct panel *to) {
    const int is_packed = w->float_zeros && cut->kind == NIBBLES && w->scale_type == BFLOATS;
    if (is_packed && cut->of_one_group && w->scale_input == 1 && w->zero_input == 1) {
        turn_groups(w, n, count, s, end, to);
        return;
    }
    for (int64_t at = s; at < end; at++)
        for (int64_t i = 0; i < count; i++) {
            const int64_t group = cut->segments[at].group, place = (at - s) * OUTPUTS + i;
            float zero = float_zero_of(w, n + i, group);
            if (cut->kind == BYTES)
                zero += WEIGHT_OFFSET;
            else if (!w->float_zeros)
                zero = (float)zero_of(w, n + i, group);
            to->scales[place] = integer_scale_of(w, n + i, group), to->minima[place] = -to->scales[place] * zero;
        }
}
