/* Vectors of this processor: operands of bfloat16 or float32, sums of float32. */
#pragma once
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#if defined(__AVX512F__) && defined(__AVX512DQ__)
#include <immintrin.h>
#define HAS_AVX512 1
#define LANES 16
#elif defined(__AVX__)
#define LANES 8
#else
#define LANES 4
#endif

/* Products of bfloat16 pairs, summed as float32, in one instruction. */
#if defined(HAS_AVX512) && defined(__AVX512BF16__) && defined(__AVX512BW__)
#define HAS_BFLOAT16_DOT 1
#define BFLOAT16_STEP 32
#else
#define BFLOAT16_STEP LANES
#endif

#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 32")
#define LINE 64 /* bytes of a cache line */

typedef uint16_t bfloat16;
typedef float floats __attribute__((vector_size(LANES * 4)));
typedef uint32_t words __attribute__((vector_size(LANES * 4)));
typedef int32_t integers __attribute__((vector_size(LANES * 4)));
typedef uint16_t halves __attribute__((vector_size(LANES * 2)));

/* Known while compiling wherever they are passed: every function that takes one is inlined. */
enum type { FLOAT32, BFLOAT16 };

INLINE size_t size_of(enum type type) { return type == FLOAT32 ? 4 : 2; }

/* Elements that one operand holds. */
INLINE int step_of(enum type type) { return type == FLOAT32 ? LANES : BFLOAT16_STEP; }

INLINE float float_of(bfloat16 value) {
    uint32_t bits = (uint32_t)value << 16;
    float result;
    memcpy(&result, &bits, sizeof result);
    return result;
}

/* To the nearest, ties to even; NaN stays NaN. */
INLINE bfloat16 bfloat16_of(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    if ((bits & 0x7fffffff) > 0x7f800000) return (bfloat16)(bits >> 16 | 0x40);
    return (bfloat16)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

/* One operand, as bits: floats, or as many bfloat16 as `multiply_add` takes at once. */
INLINE floats load(const void *from, enum type type) {
    floats result;
#ifndef HAS_BFLOAT16_DOT
    if (type == BFLOAT16) {
        halves narrow;
        memcpy(&narrow, from, sizeof narrow);
        words bits = __builtin_convertvector(narrow, words) << 16;
        memcpy(&result, &bits, sizeof result);
        return result;
    }
#endif
    memcpy(&result, from, sizeof result);
    return result;
}

/* An operand of `count` elements, fewer than it holds: the rest is zero and not read. */
INLINE floats load_part(const void *from, int count, enum type type) {
#ifdef HAS_AVX512
    if (type == FLOAT32) return (floats)_mm512_maskz_loadu_ps((__mmask16)((1u << count) - 1), from);
#endif
#ifdef HAS_BFLOAT16_DOT
    return (floats)_mm512_maskz_loadu_epi16((__mmask32)((1ull << count) - 1), from);
#endif
    char whole[LANES * 4] = {0};
    memcpy(whole, from, count * size_of(type));
    return load(whole, type);
}

INLINE floats multiply_add(floats sum, floats a, floats b, enum type type) {
#ifdef HAS_BFLOAT16_DOT
    if (type == BFLOAT16) return (floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
#endif
    return sum + a * b;
}

/* The lanes of a vector added up, always in the same order. */
INLINE float sum_of_lanes(floats vector) {
    float lanes[LANES];
    memcpy(lanes, &vector, sizeof lanes);
    for (int half = LANES / 2; half; half /= 2)
        for (int i = 0; i < half; i++) lanes[i] += lanes[i + half];
    return lanes[0];
}

/* The same for four vectors at once. */
INLINE void sum_four(float sums[4], floats a, floats b, floats c, floats d) {
#ifdef HAS_AVX512
    __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps((__m512)a, (__m512)b), _mm512_unpackhi_ps((__m512)a, (__m512)b));
    __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps((__m512)c, (__m512)d), _mm512_unpackhi_ps((__m512)c, (__m512)d));
    __m512 all = _mm512_add_ps(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xee));
    __m256 half = _mm256_add_ps(_mm512_castps512_ps256(all), _mm512_extractf32x8_ps(all, 1));
    _mm_storeu_ps(sums, _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1)));
#else
    sums[0] = sum_of_lanes(a), sums[1] = sum_of_lanes(b), sums[2] = sum_of_lanes(c), sums[3] = sum_of_lanes(d);
#endif
}

INLINE floats splat(float value) { return value - (floats){0}; }

/* e to the power of x, for x no greater than 0; relative error below 2e-7. */
INLINE floats exp_of(floats x) {
    integers visible = ~(x <= -87.0f); /* NaN too */
    floats clamped = (floats)((integers)x & visible);
    integers whole = __builtin_convertvector(clamped * 1.44269504f - 0.5f, integers);
    floats n = __builtin_convertvector(whole, floats);
    floats r = clamped - n * 0.693359375f + n * 2.12194440e-4f;
    floats power = splat(1.9875691500e-4f);
    power = power * r + 1.3981999507e-3f;
    power = power * r + 8.3334519073e-3f;
    power = power * r + 4.1665795894e-2f;
    power = power * r + 1.6666665459e-1f;
    power = power * r + 5.0000001201e-1f;
    power = power * r * r + r + 1.0f;
    floats scale = (floats)((whole + 127) << 23);
    return (floats)((integers)(power * scale) & visible);
}

INLINE float exp_of_one(float x) { return exp_of(splat(x))[0]; }

INLINE floats larger_of(floats a, floats b) {
    integers first = a > b;
    return (floats)(((integers)a & first) | ((integers)b & ~first));
}

INLINE floats tanh_of(floats x) {
    integers sign = (integers)x & INT32_MIN;
    floats size = (floats)((integers)x & INT32_MAX);
    floats small = exp_of(size * -2.0f);
    return (floats)((integers)((1.0f - small) / (1.0f + small)) | sign);
}
