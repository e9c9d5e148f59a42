/* SIMD vectors of this CPU: bfloat16 or float32 operands, float32 sums. */
#pragma once
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#if defined(__AVX512F__) && defined(__AVX512DQ__)
#define HAS_AVX512 1
#define LANES 16
#elif defined(__AVX__)
#define LANES 8
#else
#define LANES 4
#endif

#if defined(HAS_AVX512) || defined(__aarch64__)
#define REGISTERS 32 /* of vectors */
#else
#define REGISTERS 16
#endif

/* The CPU multiplies bfloat16 pairs and sums in float32 in one instruction. */
#if defined(HAS_AVX512) && defined(__AVX512BF16__) && defined(__AVX512BW__)
#define HAS_BFLOAT16_DOT 1
#define BFLOAT16_STEP 32
#else
#define BFLOAT16_STEP LANES
#endif

#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 32")
#define UNROLL_SOME _Pragma("GCC unroll 4")
#define LINE 64 /* bytes of a cache line */
#define LOG2_E 1.44269504f

typedef uint16_t bfloat16, float16;
typedef float floats __attribute__((vector_size(LANES * 4)));
typedef uint32_t words __attribute__((vector_size(LANES * 4)));
typedef int32_t integers __attribute__((vector_size(LANES * 4)));
typedef uint16_t halves __attribute__((vector_size(LANES * 2)));
typedef int8_t sixteen_bytes __attribute__((vector_size(16)));

/* Always compile-time constants, because every function that takes one is inlined. */
enum type { FLOAT32, BFLOAT16, FLOAT16 };

INLINE size_t size_of(enum type type) { return type == FLOAT32 ? 4 : 2; }

/* Elements per operand. */
INLINE int step_of(enum type type) { return type == BFLOAT16 ? BFLOAT16_STEP : LANES; }

INLINE float float_of(bfloat16 value) {
    uint32_t bits = (uint32_t)value << 16;
    float result;
    memcpy(&result, &bits, sizeof result);
    return result;
}

/* Round to nearest, ties to even; NaN stays NaN. */
INLINE bfloat16 bfloat16_of(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    if ((bits & 0x7fffffff) > 0x7f800000) return (bfloat16)(bits >> 16 | 0x40);
    return (bfloat16)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

/* float16 to float32; exact. */
INLINE floats floats_of_halves(halves narrow) {
#if defined(HAS_AVX512)
    return (floats)_mm512_cvtph_ps((__m256i)narrow);
#elif defined(__F16C__) && LANES == 8
    return (floats)_mm256_cvtph_ps((__m128i)narrow);
#elif defined(__aarch64__)
    return (floats)vcvt_f32_f16((float16x4_t)narrow);
#else
    const words wide = __builtin_convertvector(narrow, words), size = wide & 0x7fff;
    const words special = (words)(size >= 0x7c00) & 0x7f800000; /* infinities and NaN */
    const words bits = (words)((floats)(size << 13) * 0x1p112f);
    return (floats)(bits | special | (wide & 0x8000) << 16);
#endif
}

/* float32 to float16: to nearest, ties to even; NaN stays NaN. */
INLINE halves halves_of_floats(floats x) {
#if defined(HAS_AVX512)
    return (halves)_mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT);
#elif defined(__F16C__) && LANES == 8
    return (halves)_mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT);
#elif defined(__aarch64__)
    return (halves)vcvt_f16_f32((float32x4_t)x);
#else
    const words bits = (words)x, size = bits & 0x7fffffff;
    const floats half = (floats)((words){0} + 0x3f000000);
    const words small = (words)((floats)size + half) - (words)half; /* the addition rounds to multiples of 2^-24 */
    const words normal = (size - 0x38000000 + 0xfff + (size >> 13 & 1)) >> 13;
    const words is_small = (words)(size < 0x38800000), is_large = (words)(size >= 0x47800000);
    const words special = 0x7c00 | ((words)(size > 0x7f800000) & 0x200);
    const words result = (small & is_small) | (special & is_large) | (normal & ~is_small & ~is_large);
    return __builtin_convertvector(result | (bits >> 16 & 0x8000), halves);
#endif
}

INLINE float float_of_half(float16 value) { return floats_of_halves((halves){value})[0]; }

INLINE float16 half_of(float value) { return halves_of_floats((floats){value})[0]; }

/* bfloat16 to float32; exact. Spelled out, because compilers convert vectors of halves in many instructions. */
INLINE floats floats_of_bfloat16(const void *from) {
#if defined(HAS_AVX512)
    return (floats)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)from)), 16);
#elif defined(__AVX2__)
    return (floats)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)from)), 16);
#elif defined(__x86_64__) && LANES == 4
    return (floats)_mm_unpacklo_epi16(_mm_setzero_si128(), _mm_loadl_epi64((const __m128i *)from));
#elif defined(__aarch64__)
    return (floats)vshll_n_u16(vld1_u16(from), 16);
#else
    halves narrow;
    memcpy(&narrow, from, sizeof narrow);
    return (floats)(__builtin_convertvector(narrow, words) << 16);
#endif
}

/* The upper halves of all lanes. */
INLINE halves upper_halves(words wide) {
#if defined(HAS_AVX512)
    return (halves)_mm512_cvtepi32_epi16((__m512i)(wide >> 16));
#elif defined(__AVX2__)
    const __m256i shifted = (__m256i)(wide >> 16), packed = _mm256_packus_epi32(shifted, shifted);
    return (halves)_mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x08));
#elif defined(__aarch64__)
    return (halves)vshrn_n_u32((uint32x4_t)wide, 16);
#else
    return __builtin_convertvector(wide >> 16, halves);
#endif
}

/* One operand, as bits: floats, or as many bfloat16 as `multiply_add` takes. */
INLINE floats load(const void *from, enum type type) {
    floats result;
    if (type == FLOAT16) {
        halves narrow;
        memcpy(&narrow, from, sizeof narrow);
        return floats_of_halves(narrow);
    }
#ifndef HAS_BFLOAT16_DOT
    if (type == BFLOAT16) return floats_of_bfloat16(from);
#endif
    memcpy(&result, from, sizeof result);
    return result;
}

/* A partial operand of `count` elements: the rest is zero, and its memory is not read. */
INLINE floats load_part(const void *from, int count, enum type type) {
#ifdef HAS_AVX512
    if (type == FLOAT32) return (floats)_mm512_maskz_loadu_ps((__mmask16)((1u << count) - 1), from);
#endif
#ifdef HAS_BFLOAT16_DOT
    if (type == BFLOAT16) return (floats)_mm512_maskz_loadu_epi16((__mmask32)((1ull << count) - 1), from);
#endif
    char whole[LANES * 4] = {0};
    memcpy(whole, from, count * size_of(type));
    return load(whole, type);
}

/* Keep `x` in a register. Compilers fold a load into each use instead, and the loads then limit the multiply-adds. */
INLINE floats in_register(floats x) {
#ifdef HAS_AVX512
    __asm__("" : "+v"(x));
#elif defined(__x86_64__)
    __asm__("" : "+x"(x));
#elif defined(__aarch64__)
    __asm__("" : "+w"(x));
#endif
    return x;
}

/* sum + a * b, rounded once where the CPU can. By intrinsics, because compilers may add other products first, and, tuned
 * for some processors, split the operation: a sum would depend on how many rows are computed together. */
INLINE floats multiply_add(floats sum, floats a, floats b, enum type type) {
#ifdef HAS_BFLOAT16_DOT
    if (type == BFLOAT16) return (floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
#endif
#if defined(HAS_AVX512)
    return (floats)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)sum);
#elif defined(__FMA__) && LANES == 8
    return (floats)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)sum);
#elif defined(__aarch64__)
    return (floats)vfmaq_f32((float32x4_t)sum, (float32x4_t)a, (float32x4_t)b);
#else
    return in_register(sum + a * b);
#endif
}

#ifdef HAS_BFLOAT16_DOT
/* A permutation: lane i holds the 16-bit halves i and i + `distance`. */
INLINE __m512i halves_apart(int distance) {
    const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    return _mm512_add_epi32(_mm512_mullo_epi32(lane, _mm512_set1_epi32(0x10001)), _mm512_set1_epi32(distance << 16));
}

/* Two floats of each lane to a pair of bfloat16. */
INLINE floats pair_up(floats first, floats second) {
    const __m512i halves = (__m512i)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first);
    return (floats)_mm512_permutexvar_epi16(halves_apart(LANES), halves);
}

/* Two rows of bfloat16 to pairs, one number of each: `both` holds those of the lower and of the upper halves. */
INLINE void interleave(floats first, floats second, floats both[2]) {
    const __m512i index = halves_apart(2 * LANES), upper = _mm512_set1_epi32(LANES * 0x10001);
    both[0] = (floats)_mm512_permutex2var_epi16((__m512i)first, index, (__m512i)second);
    both[1] = (floats)_mm512_permutex2var_epi16((__m512i)first, _mm512_add_epi32(index, upper), (__m512i)second);
}
#endif

/* Broadcast 32 bits to all lanes. */
INLINE floats to_all_lanes(const void *from) {
    uint32_t bits;
    memcpy(&bits, from, sizeof bits);
    words all = (words){0} + bits;
    return (floats)all;
}

/* Byte i of the result is byte index[i] of `table`. Indices are below 16. */
INLINE sixteen_bytes looked_up(sixteen_bytes table, sixteen_bytes index) {
#if defined(__SSSE3__)
    return (sixteen_bytes)_mm_shuffle_epi8((__m128i)table, (__m128i)index);
#elif defined(__aarch64__)
    return (sixteen_bytes)vqtbl1q_s8((int8x16_t)table, (uint8x16_t)index);
#else
    sixteen_bytes result;
    UNROLL for (int i = 0; i < 16; i++) result[i] = table[index[i]];
    return result;
#endif
}

/* Transpose in place. */
INLINE void transpose_square(floats square[LANES]) {
#ifdef HAS_AVX512
    __m512 pairs[LANES], fours[LANES];
    UNROLL for (int i = 0; i < LANES; i += 2) {
        pairs[i] = _mm512_unpacklo_ps((__m512)square[i], (__m512)square[i + 1]);
        pairs[i + 1] = _mm512_unpackhi_ps((__m512)square[i], (__m512)square[i + 1]);
    }
    UNROLL for (int i = 0; i < LANES; i++) { /* 4q + c: column c of each quarter, of rows 4q .. 4q + 3 */
        __m512d low = (__m512d)pairs[(i & ~3) + (i >> 1 & 1)], high = (__m512d)pairs[(i & ~3) + (i >> 1 & 1) + 2];
        fours[i] = (__m512)(i & 1 ? _mm512_unpackhi_pd(low, high) : _mm512_unpacklo_pd(low, high));
    }
    UNROLL for (int c = 0; c < 4; c++) {
        __m512 even = _mm512_shuffle_f32x4(fours[c], fours[c + 4], 0x88), more;
        more = _mm512_shuffle_f32x4(fours[c + 8], fours[c + 12], 0x88);
        square[c] = (floats)_mm512_shuffle_f32x4(even, more, 0x88);
        square[c + 8] = (floats)_mm512_shuffle_f32x4(even, more, 0xdd);
        __m512 odd = _mm512_shuffle_f32x4(fours[c], fours[c + 4], 0xdd);
        more = _mm512_shuffle_f32x4(fours[c + 8], fours[c + 12], 0xdd);
        square[c + 4] = (floats)_mm512_shuffle_f32x4(odd, more, 0x88);
        square[c + 12] = (floats)_mm512_shuffle_f32x4(odd, more, 0xdd);
    }
#elif LANES == 8
    __m256 pairs[LANES], fours[LANES];
    UNROLL for (int i = 0; i < LANES; i += 2) {
        pairs[i] = _mm256_unpacklo_ps((__m256)square[i], (__m256)square[i + 1]);
        pairs[i + 1] = _mm256_unpackhi_ps((__m256)square[i], (__m256)square[i + 1]);
    }
    UNROLL for (int i = 0; i < LANES; i++) { /* 4h + c: column c of each half, of rows 4h .. 4h + 3 */
        __m256 low = pairs[(i & ~3) + (i >> 1 & 1)], high = pairs[(i & ~3) + (i >> 1 & 1) + 2];
        fours[i] = i & 1 ? _mm256_shuffle_ps(low, high, 0xee) : _mm256_shuffle_ps(low, high, 0x44);
    }
    UNROLL for (int c = 0; c < 4; c++) {
        square[c] = (floats)_mm256_permute2f128_ps(fours[c], fours[c + 4], 0x20);
        square[c + 4] = (floats)_mm256_permute2f128_ps(fours[c], fours[c + 4], 0x31);
    }
#elif defined(__x86_64__)
    __m128 a = (__m128)square[0], b = (__m128)square[1], c = (__m128)square[2], d = (__m128)square[3];
    _MM_TRANSPOSE4_PS(a, b, c, d);
    square[0] = (floats)a, square[1] = (floats)b, square[2] = (floats)c, square[3] = (floats)d;
#elif defined(__aarch64__)
    const float32x4x2_t ab = vtrnq_f32((float32x4_t)square[0], (float32x4_t)square[1]);
    const float32x4x2_t cd = vtrnq_f32((float32x4_t)square[2], (float32x4_t)square[3]);
    UNROLL for (int i = 0; i < 2; i++) {
        square[i] = (floats)vcombine_f32(vget_low_f32(ab.val[i]), vget_low_f32(cd.val[i]));
        square[i + 2] = (floats)vcombine_f32(vget_high_f32(ab.val[i]), vget_high_f32(cd.val[i]));
    }
#else
    float rows[LANES][LANES], columns[LANES][LANES];
    memcpy(rows, square, sizeof rows);
    for (int i = 0; i < LANES; i++)
        for (int j = 0; j < LANES; j++) columns[j][i] = rows[i][j];
    memcpy(square, columns, sizeof columns);
#endif
}

/* Sum of the lanes, always in the same order. */
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
#elif LANES == 8
    const __m256 ab = _mm256_hadd_ps((__m256)a, (__m256)b), cd = _mm256_hadd_ps((__m256)c, (__m256)d);
    const __m256 all = _mm256_hadd_ps(ab, cd);
    _mm_storeu_ps(sums, _mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1)));
#elif defined(__aarch64__)
    vst1q_f32(sums, vpaddq_f32(vpaddq_f32((float32x4_t)a, (float32x4_t)b), vpaddq_f32((float32x4_t)c, (float32x4_t)d)));
#else
    floats square[4] = {a, b, c, d};
    transpose_square(square);
    const floats all = square[0] + square[1] + (square[2] + square[3]);
    memcpy(sums, &all, sizeof all);
#endif
}

INLINE floats splat(float value) { return value - (floats){0}; }

/* e^x for x <= 0; relative error below 2e-7. */
INLINE floats exp_of(floats x) {
    integers visible = ~(x <= -87.0f); /* NaN too */
    floats clamped = (floats)((integers)x & visible);
    integers whole = __builtin_convertvector(clamped * LOG2_E - 0.5f, integers);
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

/* 2^x for x <= 0: exact for 0, zero below -126; NaN stays NaN. The relative error is below
 * 2e-7, and below 3e-6 where the result is to be a bfloat16. */
INLINE floats exp2_of(floats x, enum type type) {
#ifdef HAS_AVX512
    const __mmask16 visible = _mm512_cmp_ps_mask((__m512)x, _mm512_set1_ps(-126.0f), _CMP_NLE_UQ); /* NaN too */
    floats n = (floats)_mm512_roundscale_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT);
#else
    integers visible = ~(x <= -126.0f);
    x = (floats)((integers)x & visible);
    integers whole = __builtin_convertvector(x - 0.5f, integers);
    floats n = __builtin_convertvector(whole, floats);
#endif
    floats r = x - n, power;
    if (type == BFLOAT16) {
        power = splat(9.582853094e-3f) * r + 5.590642460e-2f;
        power = power * r + 2.402409861e-1f;
        power = power * r + 6.931241934e-1f;
    } else {
        power = splat(1.326472720e-3f) * r + 9.671512640e-3f;
        power = power * r + 5.550733743e-2f;
        power = power * r + 2.402224209e-1f;
        power = power * r + 6.931469776e-1f;
    }
    power = power * r + 1.0f;
#ifdef HAS_AVX512
    return (floats)_mm512_maskz_scalef_ps(visible, (__m512)power, (__m512)n);
#else
    return (floats)((integers)(power * (floats)((whole + 127) << 23)) & visible);
#endif
}

/* Elementwise: a where all bits of `mask` are set, b where none is. */
INLINE floats blend(integers mask, floats a, floats b) {
#if defined(__AVX2__) && LANES == 8
    return (floats)_mm256_blendv_ps((__m256)b, (__m256)a, (__m256)mask);
#else
    return (floats)(((integers)a & mask) | ((integers)b & ~mask));
#endif
}

/* Elementwise; b where either is NaN. */
INLINE floats larger_of(floats a, floats b) {
#ifdef HAS_AVX512
    return (floats)_mm512_max_ps((__m512)a, (__m512)b);
#endif
    return blend(a > b, a, b);
}

INLINE floats tanh_of(floats x) {
    integers sign = (integers)x & INT32_MIN;
    floats size = (floats)((integers)x & INT32_MAX);
    floats small = exp_of(size * -2.0f);
    return (floats)((integers)((1.0f - small) / (1.0f + small)) | sign);
}

/* Load LANES elements as float32. */
INLINE floats take(const void *from, enum type type) {
    floats result;
    if (type == FLOAT32) {
        memcpy(&result, from, sizeof result);
        return result;
    }
    if (type == FLOAT16) return load(from, FLOAT16);
    return floats_of_bfloat16(from);
}

/* bfloat16 in the upper halves: to nearest, ties to even; NaN stays NaN. The lower halves are open. */
INLINE words round_upper_halves(floats x) {
    const words bits = (words)x, result = bits + ((bits >> 16 & 1) + 0x7fff);
    return (words)blend(x == x, (floats)result, (floats)((words){0} + 0x7fc00000));
}

/* `x` rounded to `type`. On CPUs that flush denormals, numbers below 2^-126 become zero. */
INLINE floats rounded(floats x, enum type type) {
    if (type == FLOAT32) return x;
    if (type == FLOAT16) return floats_of_halves(halves_of_floats(x));
#ifdef HAS_BFLOAT16_DOT
    return (floats)_mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)x)), 16);
#else
    return (floats)(round_upper_halves(x) & 0xffff0000);
#endif
}

/* Store LANES elements, rounded. */
INLINE void give(void *to, floats x, enum type type) {
    if (type == FLOAT32) {
        memcpy(to, &x, sizeof x);
        return;
    }
    if (type == FLOAT16) {
        const halves narrow = halves_of_floats(x);
        memcpy(to, &narrow, sizeof narrow);
        return;
    }
#ifdef HAS_BFLOAT16_DOT
    _mm256_storeu_si256((__m256i *)to, (__m256i)_mm512_cvtneps_pbh((__m512)x));
#else
    const halves narrow = upper_halves(round_upper_halves(x));
    memcpy(to, &narrow, sizeof narrow);
#endif
}

/* The same for `count` elements, up to LANES; the other lanes are zero, and their memory is not accessed. */
INLINE floats take_some(const void *from, const int count, enum type type) {
    if (count == LANES) return take(from, type);
    char whole[LANES * 4] = {0};
    memcpy(whole, from, count * size_of(type));
    return take(whole, type);
}

INLINE void give_some(void *to, floats x, const int count, enum type type) {
    if (count == LANES) {
        give(to, x, type);
        return;
    }
    char whole[LANES * 4];
    give(whole, x, type);
    memcpy(to, whole, count * size_of(type));
}
