/* Dot products of 8-bit integers with sums of 32 bits: `QUAD` products a lane, in what instructions this CPU has.
 *
 * Quantised inputs are stored as the instructions take them (`code`), weights as 8-bit integers; without an instruction
 * for bytes, both are widened to 16 bits, which is exact and as fast as multiplying bytes in two steps.
 */
#pragma once
#include "vector.h"

#if defined(HAS_AVX512) && defined(__AVX512VNNI__) && defined(__AVX512BW__)
#define QUAD 4
#define OFFSET 128 /* the instruction takes the inputs unsigned */
typedef uint8_t code;
#elif defined(__AVXVNNI__) && LANES == 8
#include <immintrin.h>
#define QUAD 4
#define OFFSET 128
typedef uint8_t code;
#elif defined(__ARM_FEATURE_DOTPROD)
#include <arm_neon.h>
#define QUAD 4
#define OFFSET 0
typedef int8_t code;
#else
#define QUAD 2
#define OFFSET 0
typedef int16_t code;
#if defined(__SSE2__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif
#endif

#define VALUES (LANES * QUAD) /* of a vector */
typedef code codes __attribute__((vector_size(LANES * 4)));
typedef int8_t narrow_codes __attribute__((vector_size(VALUES)));

/* sum + the products of QUAD inputs `x` and weights `w` in each lane. */
INLINE integers dot(integers sum, integers x, integers w) {
#if QUAD == 4 && defined(HAS_AVX512)
    return (integers)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)x, (__m512i)w);
#elif QUAD == 4 && defined(__AVXVNNI__)
    return (integers)_mm256_dpbusd_avx_epi32((__m256i)sum, (__m256i)x, (__m256i)w);
#elif QUAD == 4
    return (integers)vdotq_s32((int32x4_t)sum, (int8x16_t)x, (int8x16_t)w);
#elif defined(HAS_AVX512) && defined(__AVX512BW__)
    return sum + (integers)_mm512_madd_epi16((__m512i)x, (__m512i)w);
#elif defined(__AVX2__) && LANES == 8
    return sum + (integers)_mm256_madd_epi16((__m256i)x, (__m256i)w);
#elif defined(__SSE2__) && LANES == 4
    return sum + (integers)_mm_madd_epi16((__m128i)x, (__m128i)w);
#elif defined(__aarch64__)
    const int32x4_t low = vmull_s16(vget_low_s16((int16x8_t)x), vget_low_s16((int16x8_t)w));
    return (integers)vaddq_s32((int32x4_t)sum, vpaddq_s32(low, vmull_high_s16((int16x8_t)x, (int16x8_t)w)));
#else
    int16_t a[VALUES], b[VALUES];
    memcpy(a, &x, sizeof a), memcpy(b, &w, sizeof b);
    for (int i = 0; i < LANES; i++) sum[i] += a[2 * i] * b[2 * i] + a[2 * i + 1] * b[2 * i + 1];
    return sum;
#endif
}

/* VALUES weights of one row as `dot` takes them. */
INLINE integers as_operand(narrow_codes narrow) {
#if QUAD == 4
    return (integers)narrow;
#else
    return (integers)__builtin_convertvector(narrow, codes);
#endif
}

INLINE integers load_weights(const int8_t *from) {
    narrow_codes narrow;
    memcpy(&narrow, from, sizeof narrow);
    return as_operand(narrow);
}

/* The same of `count` weights, fewer than VALUES: the rest is zero, and its memory is not read. */
INLINE integers load_some_weights(const int8_t *from, int64_t count) {
#if QUAD == 4 && defined(HAS_AVX512)
    return (integers)_mm512_maskz_loadu_epi8(((__mmask64)1 << count) - 1, from);
#else
    int8_t whole[VALUES] = {0};
    memcpy(whole, from, count);
    return load_weights(whole);
#endif
}

/* VALUES weights of four bits, two a byte, the lower half first, less `zero`. */
INLINE integers load_nibbles(const uint8_t *from, int zero) {
    typedef uint8_t bytes __attribute__((vector_size(VALUES / 2)));
    typedef uint16_t pairs __attribute__((vector_size(VALUES)));
    bytes narrow;
    memcpy(&narrow, from, sizeof narrow);
    pairs both = __builtin_convertvector(narrow, pairs);
    both = (both | both << 4) & 0x0f0f;
    return as_operand((narrow_codes)both - (int8_t)zero);
}

/* The same of `count` weights. */
INLINE integers load_some_nibbles(const uint8_t *from, int64_t count, int zero) {
#if VALUES == 64
    if (count == 32) {
        const __m256i wide = _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i *)from));
        const __m256i both = _mm256_and_si256(_mm256_or_si256(wide, _mm256_slli_epi16(wide, 4)), _mm256_set1_epi8(15));
        return (integers)_mm512_zextsi256_si512(_mm256_sub_epi8(both, _mm256_set1_epi8((char)zero)));
    }
#endif
    int8_t whole[VALUES] = {0};
    for (int64_t k = 0; k < count; k++) whole[k] = (int8_t)((from[k / 2] >> k % 2 * 4 & 15) - zero);
    return load_weights(whole);
}

INLINE integers load_codes(const code *from) {
    integers result;
    memcpy(&result, from, sizeof result);
    return result;
}

/* The same number of the unsigned kind in every place, for the sum of weights that `OFFSET` has added. */
INLINE integers offsets(void) { return (integers)((words){0} + OFFSET * 0x01010101u); }

/* Quantise `count` inputs to integers up to 127, each less than half a step from the input; returns the step. */
static float quantise(const char *from, int64_t count, enum type type, code *to) {
    const size_t size = size_of(type);
    floats most = {0};
    int64_t k = 0;
    for (; k + LANES <= count; k += LANES) most = larger_of((floats)((integers)take(from + k * size, type) & INT32_MAX), most);
    if (k < count) most = larger_of((floats)((integers)take_some(from + k * size, (int)(count - k), type) & INT32_MAX), most);
    float largest = 0;
    for (int i = 0; i < LANES; i++) largest = most[i] > largest ? most[i] : largest;
    const float step = largest / 127, inverse = largest > 0 ? 127 / largest : 0;
    for (k = 0; k < count; k += LANES) {
        const int some = count - k < LANES ? (int)(count - k) : LANES;
        const floats x = take_some(from + k * size, some, type) * inverse;
        /* Adding 1.5 * 2^23 rounds to the nearest integer, which is then in the lowest bits. */
        const integers rounded = (integers)(x + 12582912.0f) - 0x4b400000 + OFFSET;
        for (int i = 0; i < some; i++) to[k + i] = (code)rounded[i];
    }
    return step;
}
