/* Panels of a quantised weight: some outputs and some segments of inputs, as `dot` takes them.
 *
 * The weight is read as it is stored. Squares of words are transposed in registers, so that a vector holds words of as
 * many outputs, and scales are transposed alike: then each lane sums one output.
 */
#pragma once
#include "integer_dots.h"
#include "stored_weights.h"

#define TILE_ROWS (REGISTERS == 32 ? 6 : 4) /* of inputs */
#define VECTORS 2 /* of outputs */
#define OUTPUTS (VECTORS * LANES)
#define PANEL_INPUTS 512 /* at most: the panel stays in the L1 cache */
#define PANEL_SEGMENTS 64 /* whole vectors */
#define PANEL_WORDS (PANEL_INPUTS / 2 + 2 * PANEL_SEGMENTS)
#define ROW_BYTES (PANEL_INPUTS + 2 * LINE) /* of a row of `bytes` */

/* How the inputs of a whole product are cut: the operands of segment s are numbers first[s] .. first[s + 1]. */
struct cut {
    const struct segment *segments;
    int64_t *first;
    int64_t count;
    enum kind kind;
    int64_t in_place;     /* words are read from the weight, not from `bytes` */
};

struct panel {
    uint32_t *words;         /* [words][OUTPUTS]: nibbles as they are stored, and operands of bytes */
    float *scales, *minima;  /* [groups][OUTPUTS]; minima: what a code of zero means */
    int8_t *bytes;           /* [OUTPUTS][ROW_BYTES], if the weight is expanded first */
};

/* The operands of a vector of words for each vector of outputs: two of nibbles, one of bytes. */
INLINE void load_operands(const uint32_t *w, enum kind kind, words to[2][VECTORS]) {
    UNROLL for (int v = 0; v < VECTORS; v++) {
        const floats read = take(w + v * LANES, FLOAT32);
        words found[2] = {(words)(kind == BYTES ? in_register(read) : read)};
        if (kind == NIBBLES) unpack((words)read, kind, found);
        to[0][v] = found[0], to[1][v] = found[1];
    }
}

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
    return (struct cut){segments, first, count, kind, in_place};
}

/* Words of a panel per word of the weight. */
INLINE int stored_of(enum kind kind) { return kind == NIBBLES ? 1 : operands_of(kind); }

/* The word of the panel that begins with segment `s` at which segment `at` begins. */
INLINE int64_t first_word(const struct cut *cut, int64_t s, int64_t at) {
    return (cut->first[at] - cut->first[s]) >> (cut->kind == NIBBLES);
}

/* How many segments from `s` on make a panel. */
INLINE int64_t panel_end(const struct cut *cut, int64_t s) {
    int64_t end = s + 1;
    const int64_t start = cut->segments[s].start;
    while (end < cut->count && end - s < PANEL_SEGMENTS && cut->segments[end].stop - start <= PANEL_INPUTS) end++;
    return end;
}

/* Store a transposed square of words, the first `count`. Nibbles are unpacked where they are multiplied. */
INLINE void put_square(floats square[LANES], const int count, enum kind kind, uint32_t *to) {
    transpose_square(square);
    UNROLL for (int i = 0; i < LANES; i++) {
        words found[2] = {(words)square[i]};
        if (kind == BYTES) unpack((words)square[i], kind, found);
        if (i < count) memcpy(to + i * stored_of(kind) * OUTPUTS, &found[0], sizeof found[0]);
        if (stored_of(kind) == 2 && i < count) memcpy(to + (2 * i + 1) * OUTPUTS, &found[1], sizeof found[1]);
    }
}

static __attribute__((noinline)) void put_rest(const char *const rows[LANES], int64_t count, enum kind kind,
                                               uint32_t *to) {
    floats square[LANES];
    for (int i = 0; i < LANES; i++) square[i] = (floats)load_bytes(rows[i], count);
    put_square(square, (int)(count + 3) / 4, kind, to);
}

/* Words of LANES outputs: `rows` are where they begin, `count` their bytes; `ahead`: to what is read next, or 0. */
INLINE void put_words(const char *rows[LANES], int64_t count, int64_t ahead, enum kind kind, uint32_t *to) {
    for (; count >= LANES * 4; count -= LANES * 4, to += LANES * stored_of(kind) * OUTPUTS) {
        floats square[LANES];
        UNROLL for (int i = 0; i < LANES; i++) {
            square[i] = take(rows[i], FLOAT32);
            __builtin_prefetch(rows[i] + ahead, 0, 2);
            rows[i] += LANES * 4;
        }
        put_square(square, LANES, kind, to);
    }
    if (count) put_rest(rows, count, kind, to);
}

/* The inputs of segments from `s` on that end with whole words: these can be read as one. next: the segment after. */
INLINE int64_t run_length(const struct cut *cut, int64_t s, int64_t end, int64_t *next) {
    const int64_t start = cut->segments[s].start;
    *next = s + 1;
    while (*next < end && !((cut->segments[*next].start - start) & (inputs_of(cut->kind) - 1))) ++*next;
    return cut->segments[*next - 1].stop - start;
}

/* The words of segments s .. end of outputs n .. n + count. */
static void fill_words(const struct stored *w, const struct cut *cut, int64_t n, int64_t count, int64_t s,
                          int64_t end, const struct panel *to) {
    const int64_t start = cut->segments[s].start, per_byte = cut->kind == NIBBLES ? 2 : 1;
    if (!cut->in_place) expand_rows(w, n, count, cut->segments + s, end - s, to->bytes - start, ROW_BYTES);
    const char *base = cut->in_place ? w->codes + n * w->code_output : (const char *)to->bytes - start;
    const int64_t step = cut->in_place ? w->code_output : ROW_BYTES, ahead = cut->in_place ? OUTPUTS * step : 0;
    for (int v = 0; v < VECTORS; v++)
        for (int64_t at = s, next; at < end; at = next) {
            const char *rows[LANES];
            for (int64_t i = 0; i < LANES; i++) {
                const int64_t row = v * LANES + i; /* outputs beyond the last are read as the last */
                rows[i] = base + (row < count ? row : count - 1) * step + cut->segments[at].start / per_byte;
            }
            uint32_t *words = to->words + first_word(cut, s, at) * OUTPUTS + v * LANES;
            const int64_t length = run_length(cut, at, end, &next);
            if (HAS_NIBBLES && cut->kind == NIBBLES)
                put_words(rows, (length + 7) / 8 * 4, ahead, NIBBLES, words);
            else
                put_words(rows, length, ahead, BYTES, words);
        }
}

/* LANES scales and as many zero points in bfloat16, one word for two. */
INLINE floats load_groups(const bfloat16 *scales, const bfloat16 *zeros) {
#ifdef HAS_AVX512
    const __m256i both[2] = {_mm256_loadu_si256((const __m256i *)scales), _mm256_loadu_si256((const __m256i *)zeros)};
    return (floats)_mm512_inserti64x4(_mm512_castsi256_si512(both[0]), both[1], 1);
#elif LANES == 8
    return (floats)_mm256_loadu2_m128((const float *)zeros, (const float *)scales);
#else
    floats result;
    memcpy(&result, scales, LANES * sizeof *scales), memcpy((char *)&result + sizeof result / 2, zeros, sizeof result / 2);
    return result;
#endif
}

static __attribute__((noinline)) floats load_some_groups(const bfloat16 *scales, const bfloat16 *zeros, int64_t count) {
    bfloat16 both[2 * LANES] = {0};
    memcpy(both, scales, count * sizeof *both), memcpy(both + LANES, zeros, count * sizeof *both);
    return load_groups(both, both + LANES);
}

/* Scales and zero points in bfloat16 of groups s .. end, in squares. */
static void turn_groups(const struct stored *w, int64_t n, int64_t count, int64_t s, int64_t end,
                        const struct panel *to) {
    for (int v = 0; v < VECTORS; v++)
        for (int64_t at = s; at < end; at += LANES) {
            /* What follows a row's groups, if read too, are those of later rows. */
            const int64_t behind = w->outputs - n - count, step = w->scale_output < w->zero_output ? w->scale_output : w->zero_output;
            const int is_inside = end - at >= LANES || behind * step >= LANES;
            floats square[LANES];
            UNROLL for (int64_t i = 0; i < LANES; i++) {
                const int64_t row = n + (v * LANES + i < count ? v * LANES + i : count - 1);
                const bfloat16 *scales = (const bfloat16 *)w->scales + row * w->scale_output + at;
                const bfloat16 *zeros = (const bfloat16 *)w->zeros + row * w->zero_output + at;
                square[i] = is_inside ? load_groups(scales, zeros) : load_some_groups(scales, zeros, end - at);
                __builtin_prefetch(scales + OUTPUTS * w->scale_output, 0, 2);
                __builtin_prefetch(zeros + OUTPUTS * w->zero_output, 0, 2);
            }
            transpose_square(square);
            float *scales = to->scales + (at - s) * OUTPUTS + v * LANES;
            float *minima = to->minima + (at - s) * OUTPUTS + v * LANES;
            UNROLL for (int i = 0; i < LANES; i++) {
                const words two = (words)square[i / 2], other = (words)square[LANES / 2 + i / 2];
                const floats scale = (floats)(i % 2 ? two & 0xffff0000 : two << 16);
                const floats minimum = -scale * (floats)(i % 2 ? other & 0xffff0000 : other << 16);
                memcpy(scales + i * OUTPUTS, &scale, sizeof scale), memcpy(minima + i * OUTPUTS, &minimum, sizeof minimum);
            }
        }
}

/* The scales of groups s .. end of outputs n .. n + count, and what codes of zero mean. */
static void fill_scales(const struct stored *w, const struct cut *cut, int64_t n, int64_t count, int64_t s, int64_t end,
                        const struct panel *to) {
    const int is_float = w->float_zeros && cut->kind == NIBBLES && w->scale_type == BFLOATS;
    if (is_float && w->scale_input == 1 && w->zero_input == 1) {
        turn_groups(w, n, count, s, end, to);
        return;
    }
    for (int64_t group = s; group < end; group++)
        for (int64_t i = 0; i < count; i++) {
            const int64_t place = (group - s) * OUTPUTS + i;
            float zero = float_zero_of(w, n + i, group);
            if (cut->kind == BYTES)
                zero += WEIGHT_OFFSET;
            else if (!w->float_zeros)
                zero = (float)zero_of(w, n + i, group);
            to->scales[place] = integer_scale_of(w, n + i, group), to->minima[place] = -to->scales[place] * zero;
        }
}
