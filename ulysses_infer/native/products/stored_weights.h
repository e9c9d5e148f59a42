/* Quantised weights as checkpoints store them, and their expansion to 8-bit integers or float32, a few rows at a time. */
#pragma once
#include <stdlib.h>

#include "vector.h"

enum values { INT8, E4M3, PACKED, E2M1 };
enum scales { FLOATS, EXPONENTS, BFLOATS }; /* exponents: of two, in bytes */
enum packed { WHOLE, ALONG_INPUTS, ALONG_OUTPUTS };

/* A slice of the matrix [outputs, inputs] of one expert; the others follow at the `*_expert` strides. An index of codes,
 * scales or zeros may cover several features: `first_output` and `first_input` say where in them the slice begins. */
struct stored {
    const char *codes, *scales, *zeros;
    const int32_t *groups; /* of each input, or null: consecutive inputs */
    int64_t outputs, inputs, first_output, first_input;
    int64_t code_output, code_input;                         /* bytes from one index to the next */
    int64_t scale_output, scale_input, zero_output, zero_input; /* elements; 0: the same for all */
    int64_t codes_expert, scales_expert, zeros_expert, groups_expert; /* bytes */
    int64_t values, packed, bits, interleaved;
    int64_t scale_outputs, group_size; /* features per scale; group_size 0: all inputs */
    int64_t scale_type;
    int64_t float_zeros;               /* zero points are bfloat16, laid out like the scales, not packed integers */
    int64_t zero;                      /* the zero point, or what is added to stored integers */
    int64_t segment;                   /* inputs that share a scale when the inputs are quantised */
};

/* Inputs [start, stop) of a slice that share one scale of the weight and one of the quantised inputs. */
struct segment {
    int64_t start, stop, group;
};

static const int AWQ_PLACES[8] = {0, 4, 1, 5, 2, 6, 3, 7}; /* of value i, in words of four bits */
static const int8_t E2M1_HALVES[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};

/* At most this many segments; `find_segments` writes them and returns how many. */
static int64_t most_segments(const struct stored *w) {
    const int64_t size = w->group_size && w->group_size < w->segment ? w->group_size : w->segment;
    return w->inputs / size + 3 + (w->group_size ? w->inputs / w->group_size : 0);
}

/* Segments end at multiples of `segment` and of the group size, counted from the first input of the whole layer. */
static int64_t find_segments(const struct stored *w, struct segment *to) {
    const int64_t groups = w->group_size, first = groups ? w->first_input / groups : 0;
    int64_t count = 0;
    for (int64_t k = 0; k < w->inputs; count++) {
        const int64_t place = w->first_input + k;
        int64_t stop = (place / w->segment + 1) * w->segment - w->first_input;
        if (groups && (place / groups + 1) * groups - w->first_input < stop)
            stop = (place / groups + 1) * groups - w->first_input;
        stop = stop < w->inputs ? stop : w->inputs;
        to[count] = (struct segment){k, stop, groups ? place / groups - first : 0};
        k = stop;
    }
    return count;
}

/* The matrix of expert `e`. */
static struct stored of_expert(const struct stored *w, int64_t e) {
    struct stored one = *w;
    one.codes += e * w->codes_expert, one.scales += e * w->scales_expert;
    if (one.zeros) one.zeros += e * w->zeros_expert;
    if (one.groups) one.groups = (const int32_t *)((const char *)one.groups + e * w->groups_expert);
    return one;
}

/* Number of the scale of output n and a group; of its zero point, if that is not an integer. */
static inline int64_t scale_place(const struct stored *w, int64_t n, int64_t group) {
    return (w->first_output % w->scale_outputs + n) / w->scale_outputs * w->scale_output + group * w->scale_input;
}

static inline float scale_of(const struct stored *w, int64_t n, int64_t group) {
    const int64_t place = scale_place(w, n, group);
    if (!w->scales) return 1;
    if (w->scale_type == FLOATS) return ((const float *)w->scales)[place];
    if (w->scale_type == BFLOATS) return float_of(((const bfloat16 *)w->scales)[place]);
    const uint32_t exponent = ((const uint8_t *)w->scales)[place], bits = exponent ? exponent << 23 : 1u << 22;
    float power;
    memcpy(&power, &bits, sizeof power);
    return power;
}

/* The zero point that is not an integer, else 0. */
static inline float float_zero_of(const struct stored *w, int64_t n, int64_t group) {
    return w->float_zeros ? float_of(((const bfloat16 *)w->zeros)[n * w->zero_output + group * w->zero_input]) : 0;
}

/* The value number `i` of those that words from `from` on, `stride` bytes apart, hold. */
static inline int value_of(const struct stored *w, const char *from, int64_t i, int64_t stride) {
    const int64_t per_word = 32 / w->bits;
    const int place = w->interleaved ? AWQ_PLACES[i % 8] : (int)(i % per_word);
    uint32_t word;
    memcpy(&word, from + i / per_word * stride, sizeof word);
    return word >> (place * w->bits) & ((1u << w->bits) - 1);
}

static inline int zero_of(const struct stored *w, int64_t n, int64_t group) {
    if (!w->zeros || w->float_zeros) return (int)w->zero;
    const int64_t first = w->first_output % (32 / w->bits);
    return value_of(w, w->zeros + group * w->zero_input * 4, first + n, w->zero_output * 4) + (int)w->zero;
}

/* The code of output n and input k, before the zero point is subtracted. */
static inline int code_of(const struct stored *w, int64_t n, int64_t k) {
    const int64_t per_word = 32 / w->bits;
    if (w->packed == ALONG_INPUTS)
        return value_of(w, w->codes + n * w->code_output, w->first_input % per_word + k, w->code_input);
    return value_of(w, w->codes + k * w->code_input, w->first_output % per_word + n, w->code_output);
}

/* Eight values of four bits as eight bytes, the first in the lowest. */
static inline uint64_t spread_nibbles(uint32_t word) {
    uint64_t x = word;
    x = (x | x << 16) & 0x0000ffff0000ffff;
    x = (x | x << 8) & 0x00ff00ff00ff00ff;
    return (x | x << 4) & 0x0f0f0f0f0f0f0f0f;
}

/* Subtract `zero`, at most 31, from each of eight bytes below 16. */
static inline uint64_t less(uint64_t bytes, int zero) {
    const uint64_t ones = 0x0101010101010101;
    return ((bytes | ones * 0x80) - ones * zero) ^ ones * 0x80;
}

/* `count` bytes of two values each, the lower half first, less `zero`. */
#define EXPAND_BYTES(count)                                                                          \
    INLINE void expand_##count##_bytes(const uint8_t *from, int zero, int8_t *to) {                  \
        typedef uint8_t bytes __attribute__((vector_size(count)));                                   \
        typedef uint16_t pairs __attribute__((vector_size(2 * count)));                              \
        bytes narrow;                                                                                \
        memcpy(&narrow, from, sizeof narrow);                                                        \
        pairs both = __builtin_convertvector(narrow, pairs);                                         \
        both = (both | both << 4) & 0x0f0f;                                                          \
        both = ((both | 0x8080) - (uint16_t)(zero * 0x0101)) ^ 0x8080;                               \
        memcpy(to, &both, sizeof both);                                                              \
    }
EXPAND_BYTES(32)
EXPAND_BYTES(16)

/* The same for `count` values. */
INLINE void expand_nibbles(const uint8_t *from, int64_t count, int zero, int8_t *to) {
    for (; count >= 64; count -= 64, from += 32, to += 64) expand_32_bytes(from, zero, to);
    for (; count >= 32; count -= 32, from += 16, to += 32) expand_16_bytes(from, zero, to);
    for (; count >= 2; count -= 2, from++, to += 2)
        to[0] = (int8_t)((*from & 15) - zero), to[1] = (int8_t)((*from >> 4) - zero);
    if (count) to[0] = (int8_t)((*from & 15) - zero);
}

/* The bytes of eight rows of eight become those of eight columns. */
static inline void transpose_bytes(uint64_t rows[8]) {
    static const uint64_t masks[3] = {0x00ff00ff00ff00ff, 0x0000ffff0000ffff, 0x00000000ffffffff};
    for (int level = 0; level < 3; level++) {
        const int distance = 1 << level, shift = 8 << level;
        for (int i = 0; i < 8; i++)
            if (!(i & distance)) {
                const uint64_t low = rows[i], high = rows[i + distance], mask = masks[level];
                rows[i] = (low & mask) | (high & mask) << shift;
                rows[i + distance] = (low >> shift & mask) | (high & ~mask);
            }
    }
}

/* Eight outputs of one word along the outputs as eight bytes, in order. */
static inline uint64_t outputs_of(uint32_t word, int is_interleaved) {
    const uint64_t values = spread_nibbles(word);
    if (!is_interleaved) return values;
    /* Places 0 1 2 3 4 5 6 7 hold the values 0 2 4 6 1 3 5 7. */
    uint64_t even = values & 0xffffffff, odd = values >> 32;
    even = (even | even << 16) & 0x0000ffff0000ffff, odd = (odd | odd << 16) & 0x0000ffff0000ffff;
    even = (even | even << 8) & 0x00ff00ff00ff00ff, odd = (odd | odd << 8) & 0x00ff00ff00ff00ff;
    return even | odd << 8;
}

/* Words of four bits along the outputs: eight outputs from n on, the first of a word, of a segment of whole eights. */
static void expand_columns(const struct stored *w, int64_t n, const struct segment *s, int8_t *to, int64_t stride) {
    const int64_t place = (w->first_output % 8 + n) / 8;
    const char *codes = w->codes + place * w->code_output;
    uint64_t zeros = 0x0101010101010101 * (uint64_t)w->zero;
    if (w->zeros && !w->float_zeros) {
        uint32_t word;
        memcpy(&word, w->zeros + (place * w->zero_output + s->group * w->zero_input) * 4, sizeof word);
        zeros += outputs_of(word, (int)w->interleaved);
    }
    for (int64_t k = s->start; k < s->stop; k += 8) {
        uint64_t rows[8];
        for (int i = 0; i < 8; i++) {
            uint32_t word;
            memcpy(&word, codes + (k + i) * w->code_input, sizeof word);
            rows[i] = ((outputs_of(word, (int)w->interleaved) | 0x8080808080808080) - zeros) ^ 0x8080808080808080;
        }
        transpose_bytes(rows);
        for (int i = 0; i < 8; i++) memcpy(to + i * stride + k, &rows[i], 8);
    }
}

/* Replace codes of e2m1 by twice their values. */
static void to_halves(int8_t *row, int64_t count) {
    sixteen_bytes table, codes;
    memcpy(&table, E2M1_HALVES, sizeof table);
    for (int64_t k = 0; k < count; k += 16) {
        const size_t size = count - k < 16 ? (size_t)(count - k) : 16;
        memcpy(&codes, row + k, size);
        codes = looked_up(table, codes & 15);
        memcpy(row + k, &codes, size);
    }
}

/* What the 8-bit integers of a segment are to be multiplied with. */
static inline float integer_scale_of(const struct stored *w, int64_t n, int64_t group) {
    return scale_of(w, n, group) * (w->values == E2M1 ? 0.5f : 1);
}

/* How a format's words are read: known outside of the loops. */
enum reading { BYTE_BY_BYTE, NIBBLE_WORDS, STRIDED_WORDS, COLUMNS, ONE_BY_ONE };

static enum reading reading_of(const struct stored *w) {
    if (w->values == INT8) return BYTE_BY_BYTE;
    if (w->bits != 4) return ONE_BY_ONE;
    if (w->packed == ALONG_INPUTS && w->first_input % 8 == 0) return w->code_input == 4 ? NIBBLE_WORDS : STRIDED_WORDS;
    return w->packed == ALONG_OUTPUTS && w->values == PACKED ? COLUMNS : ONE_BY_ONE;
}

/* One segment of one output as 8-bit integers, its integer zero point subtracted, in to[k]. */
INLINE void expand_row(const struct stored *w, int64_t n, const struct segment *s, enum reading reading, int8_t *to) {
    const int64_t start = s->start, count = s->stop - start;
    const char *codes = w->codes + n * w->code_output;
    const int zero = w->values == PACKED ? zero_of(w, n, s->group) : 0;
    if (reading == BYTE_BY_BYTE && w->code_input == 1) {
        memcpy(to + start, codes + start, count);
    } else if (reading == BYTE_BY_BYTE) {
        for (int64_t k = start; k < s->stop; k++) to[k] = *(const int8_t *)(codes + k * w->code_input);
    } else if (reading == NIBBLE_WORDS && start % 2 == 0) {
        expand_nibbles((const uint8_t *)codes + start / 2, count, zero, to + start);
    } else if (reading == STRIDED_WORDS && start % 8 == 0 && count % 8 == 0) {
        for (int64_t k = start; k < s->stop; k += 8) {
            uint32_t word;
            memcpy(&word, codes + k / 8 * w->code_input, sizeof word);
            const uint64_t bytes = less(spread_nibbles(word), zero);
            memcpy(to + k, &bytes, sizeof bytes);
        }
    } else {
        for (int64_t k = start; k < s->stop; k++) to[k] = (int8_t)(code_of(w, n, k) - zero);
    }
    if (w->values == E2M1) to_halves(to + start, count);
}

/* The outputs [n, n + count) as 8-bit integers, integer zero points subtracted: to[i * stride + k]. */
static void expand_rows(const struct stored *w, int64_t n, int64_t count, const struct segment *segments,
                        int64_t num_segments, int8_t *to, int64_t stride) {
    const enum reading reading = reading_of(w);
    for (int64_t i = 0; i < count; i++) {
        const int64_t begin = i - (w->first_output + n + i) % 8; /* of the word along the outputs */
        const int in_columns = reading == COLUMNS && begin >= 0 && begin + 8 <= count;
        for (int64_t s = 0; s < num_segments; s++) {
            const struct segment *segment = &segments[s];
            const int whole = (segment->stop - segment->start) % 8 == 0;
            if (!in_columns || !whole)
                expand_row(w, n + i, segment, reading, to + i * stride);
            else if (begin == i)
                expand_columns(w, n + i, segment, to + i * stride, stride);
        }
    }
}

/* Whether the weights less their zero points are integers of 8 bits. */
static inline int has_integers(const struct stored *w) {
    if (w->groups || w->values == E4M3) return 0;
    return w->values != PACKED || w->bits <= 4 || (!w->zeros && w->zero == 128);
}

static void expand_e4m3(const uint8_t *from, int64_t count, float scale, float *to) {
    const float all = scale * 0x1p120f; /* the exponents' biases differ by 120 */
    for (int64_t k = 0; k < count; k++) {
        const uint32_t bits = (uint32_t)(from[k] & 0x7f) << 20 | (uint32_t)(from[k] & 0x80) << 24;
        float value;
        memcpy(&value, &bits, sizeof value);
        to[k] = value * all;
    }
}

/* One segment of the outputs [n, n + count), at most 8, as float32: to[i * stride + k - start]. `bytes`: scratch for integers. */
static void widen_segment(const struct stored *w, int64_t n, int64_t count, const struct segment *s, int8_t *bytes,
                          float *to, int64_t stride) {
    const int64_t length = s->stop - s->start;
    for (int64_t i = 0; i < count && w->values == E4M3; i++) {
        const uint8_t *codes = (const uint8_t *)w->codes + (n + i) * w->code_output + s->start * w->code_input;
        float *row = to + i * stride;
        if (w->code_input == 1)
            expand_e4m3(codes, length, scale_of(w, n + i, s->group), row);
        else
            for (int64_t k = 0; k < length; k++)
                expand_e4m3(codes + k * w->code_input, 1, scale_of(w, n + i, s->group), row + k);
    }
    if (w->values == E4M3) return;
    if (!has_integers(w)) {
        for (int64_t i = 0; i < count; i++)
            for (int64_t k = s->start; k < s->stop; k++) {
                const int64_t group = w->groups ? w->groups[k] : s->group;
                const float value = (float)(code_of(w, n + i, k) - zero_of(w, n + i, group));
                to[i * stride + k - s->start] = (value - float_zero_of(w, n + i, group)) * scale_of(w, n + i, group);
            }
        return;
    }
    const int64_t room = w->inputs + LINE;
    expand_rows(w, n, count, s, 1, bytes, room);
    for (int64_t i = 0; i < count; i++) {
        const float scale = integer_scale_of(w, n + i, s->group), zero = float_zero_of(w, n + i, s->group);
        for (int64_t k = 0; k < length; k++) to[i * stride + k] = ((float)bytes[i * room + s->start + k] - zero) * scale;
    }
}
