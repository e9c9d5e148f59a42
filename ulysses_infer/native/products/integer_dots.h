/* Dot products of 8-bit integers with sums of 32 bits, in what instructions this CPU has.
 *
 * A lane belongs to one output. What is read of a weight is words of one output: four bytes, or eight values of four
 * bits. `unpack` turns a vector of them into one or two operands of `dot`, and `pack_inputs` arranges quantised inputs
 * alike. Without an instruction for bytes, these are widened to 16 bits.
 */
#pragma once
#include "vector.h"

/* BYTES: signed, plus WEIGHT_OFFSET. NIBBLES: unsigned. */
enum kind { BYTES, NIBBLES };

#if defined(HAS_AVX512) && defined(__AVX512VNNI__) && defined(__AVX512BW__)
#define DOTS_OF_BYTES 1
#define WEIGHT_OFFSET 128 /* the instruction takes one operand unsigned */
#elif defined(__AVXVNNI__) && LANES == 8
#define DOTS_OF_BYTES 1
#define WEIGHT_OFFSET 128
#elif defined(__ARM_FEATURE_DOTPROD)
#define DOTS_OF_BYTES 1
#define WEIGHT_OFFSET 0
#else
#define DOTS_OF_BYTES 0
#define WEIGHT_OFFSET 0
#endif

/* Bytes below 16 are multiplied with sums of 16 bits, which hold the products of
 * NARROW_WORDS words of nibbles. */
#if !DOTS_OF_BYTES && ((defined(HAS_AVX512) && defined(__AVX512BW__)) || (defined(__AVX2__) && LANES == 8) || \
                       (defined(__SSSE3__) && LANES == 4))
#define NARROW_SUMS 1
#else
#define NARROW_SUMS 0
#endif
#define NARROW_WORDS 4
#define HAS_NIBBLES (DOTS_OF_BYTES || NARROW_SUMS)

typedef int16_t shorts __attribute__((vector_size(LANES * 4)));
typedef int8_t narrow_codes __attribute__((vector_size(LANES)));

/* Operands of each word that is read, and inputs that such a word covers. */
INLINE int operands_of(enum kind kind) { return kind == NIBBLES || !DOTS_OF_BYTES ? 2 : 1; }
INLINE int inputs_of(enum kind kind) { return kind == NIBBLES ? 8 : 4; }

/* A vector of words to one or two operands: of bytes that are widened the even and the odd ones, of nibbles the lower
 * and the upper ones of each byte. */
INLINE void unpack(words read, enum kind kind, words to[2]) {
    if (kind == NIBBLES) {
        to[0] = read & 0x0f0f0f0f, to[1] = read >> 4 & 0x0f0f0f0f;
    } else if (DOTS_OF_BYTES) {
        to[0] = WEIGHT_OFFSET ? read ^ 0x80808080 : read;
    } else {
        to[0] = (words)((shorts)((shorts)read << 8) >> 8), to[1] = (words)((shorts)read >> 8);
    }
}

/* Sums of 16 bits plus the products of weights below 16. */
INLINE shorts narrow_dot(shorts sum, words x, words w) {
#if NARROW_SUMS && defined(HAS_AVX512)
    return sum + (shorts)_mm512_maddubs_epi16((__m512i)w, (__m512i)x);
#elif NARROW_SUMS && LANES == 8
    return sum + (shorts)_mm256_maddubs_epi16((__m256i)w, (__m256i)x);
#elif NARROW_SUMS
    return sum + (shorts)_mm_maddubs_epi16((__m128i)w, (__m128i)x);
#else
    (void)x, (void)w;
    return sum;
#endif
}

/* sum + the products of two numbers of 16 bits in each lane. */
INLINE integers pair_dot(integers sum, words x, words w) {
#if defined(HAS_AVX512) && defined(__AVX512BW__)
    return sum + (integers)_mm512_madd_epi16((__m512i)x, (__m512i)w);
#elif defined(__AVX2__) && LANES == 8
    return sum + (integers)_mm256_madd_epi16((__m256i)x, (__m256i)w);
#elif defined(__SSE2__) && LANES == 4
    return sum + (integers)_mm_madd_epi16((__m128i)x, (__m128i)w);
#elif defined(__aarch64__)
    const int16x8_t a = (int16x8_t)x, b = (int16x8_t)w;
    const int32x4_t low = vmull_s16(vget_low_s16(a), vget_low_s16(b));
    return (integers)vaddq_s32((int32x4_t)sum, vpaddq_s32(low, vmull_high_s16(a, b)));
#else
    int16_t a[2 * LANES], b[2 * LANES];
    memcpy(a, &x, sizeof a), memcpy(b, &w, sizeof b);
    for (int i = 0; i < LANES; i++) sum[i] += a[2 * i] * b[2 * i] + a[2 * i + 1] * b[2 * i + 1];
    return sum;
#endif
}

/* sum + the products of the inputs `x` and the weights `w` of one operand in each lane. */
INLINE integers dot(integers sum, words x, words w) {
#if DOTS_OF_BYTES && defined(HAS_AVX512)
    return (integers)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)w, (__m512i)x);
#elif DOTS_OF_BYTES && defined(__AVXVNNI__)
    return (integers)_mm256_dpbusd_avx_epi32((__m256i)sum, (__m256i)w, (__m256i)x);
#elif DOTS_OF_BYTES
    return (integers)vdotq_s32((int32x4_t)sum, (int8x16_t)x, (int8x16_t)w);
#else
    return pair_dot(sum, x, w);
#endif
}

/* What `byte_dot` needs of weights beside themselves, the same for all rows. */
INLINE words magnitudes(words w) {
#if DOTS_OF_BYTES
    return w;
#elif defined(HAS_AVX512) && defined(__AVX512BW__)
    return (words)_mm512_abs_epi8((__m512i)w);
#elif defined(__AVX2__) && LANES == 8
    return (words)_mm256_abs_epi8((__m256i)w);
#elif defined(__SSSE3__) && LANES == 4
    return (words)_mm_abs_epi8((__m128i)w);
#else
    return w;
#endif
}

/* sum + the products of bytes, the inputs from -127 to 127, over all lanes together: which lane has which is open. The
 * weights are signed, plus WEIGHT_OFFSET. Pairs of products fit into 16 bits: at most 2 * 127 * 128. */
INLINE integers byte_dot(integers sum, words x, words w, words magnitude) {
#if DOTS_OF_BYTES
    (void)magnitude;
    return dot(sum, x, w);
#elif defined(HAS_AVX512) && defined(__AVX512BW__)
    const __m512i inputs = (__m512i)x, zero = _mm512_setzero_si512();
    const __m512i turned = _mm512_mask_sub_epi8(inputs, _mm512_movepi8_mask((__m512i)w), zero, inputs);
    return pair_dot(sum, (words)_mm512_maddubs_epi16((__m512i)magnitude, turned), (words){0} + 0x00010001);
#elif defined(__AVX2__) && LANES == 8
    const __m256i turned = _mm256_sign_epi8((__m256i)x, (__m256i)w);
    return pair_dot(sum, (words)_mm256_maddubs_epi16((__m256i)magnitude, turned), (words){0} + 0x00010001);
#elif defined(__SSSE3__) && LANES == 4
    const __m128i turned = _mm_sign_epi8((__m128i)x, (__m128i)w);
    return pair_dot(sum, (words)_mm_maddubs_epi16((__m128i)magnitude, turned), (words){0} + 0x00010001);
#elif defined(__aarch64__)
    (void)magnitude;
    const int8x16_t a = (int8x16_t)x, b = (int8x16_t)w;
    const int16x8_t products = vmlal_high_s8(vmull_s8(vget_low_s8(a), vget_low_s8(b)), a, b);
    return (integers)vpadalq_s16((int32x4_t)sum, products);
#else
    (void)magnitude;
    int8_t a[4 * LANES], b[4 * LANES];
    memcpy(a, &x, sizeof a), memcpy(b, &w, sizeof b);
    for (int i = 0; i < 4 * LANES; i++) sum[i / 4] += a[i] * b[i];
    return sum;
#endif
}

/* `count` bytes, at most a vector; the rest is zero, and its memory is not read. */
INLINE words load_bytes(const char *from, int64_t count) {
    words result;
    if (count >= (int64_t)sizeof result) {
        memcpy(&result, from, sizeof result);
        return result;
    }
#if defined(HAS_AVX512) && defined(__AVX512BW__)
    return (words)_mm512_maskz_loadu_epi8(((__mmask64)1 << count) - 1, from);
#else
    char whole[sizeof result] = {0};
    memcpy(whole, from, count);
    memcpy(&result, whole, sizeof result);
    return result;
#endif
}

/* Lane i of the result is lane index[i] of `x`. */
INLINE floats permuted(floats x, integers index) {
#if defined(HAS_AVX512)
    return (floats)_mm512_permutexvar_ps((__m512i)index, (__m512)x);
#elif defined(__AVX2__)
    return (floats)_mm256_permutevar8x32_ps((__m256)x, (__m256i)index);
#elif LANES == 4
    return (floats)looked_up((sixteen_bytes)x, (sixteen_bytes)(index * 0x04040404 + 0x03020100));
#else
    floats result;
    UNROLL for (int i = 0; i < LANES; i++) result[i] = x[index[i]];
    return result;
#endif
}

/* The largest lane, which is not NaN. */
INLINE float largest_of(floats x) {
    UNROLL for (int half = LANES / 2; half; half /= 2) {
        integers other;
        UNROLL for (int i = 0; i < LANES; i++) other[i] = i ^ half;
        x = larger_of(permuted(x, other), x);
    }
    return x[0];
}

/* Round to the nearest integers; adds them to `sums`. */
INLINE narrow_codes to_codes(floats x, integers *sums) {
    /* Adding 1.5 * 2^23 leaves the rounded integer in the lowest bits. */
    const integers rounded = (integers)(x + 12582912.0f) - 0x4b400000;
    *sums += rounded;
#if defined(__AVX2__) && LANES == 8
    const __m256i wide = (__m256i)rounded;
    const __m128i narrow = _mm_packs_epi32(_mm256_castsi256_si128(wide), _mm256_extracti128_si256(wide, 1));
    return (narrow_codes)_mm_cvtsi128_si64(_mm_packs_epi16(narrow, narrow));
#else
    return __builtin_convertvector(rounded, narrow_codes);
#endif
}

/* Quantise `count` inputs to integers up to 127, each less than half a step from the input; returns the step.
 * sum: of the integers. */
static float quantise(const char *from, int64_t count, enum type type, int8_t *to, int32_t *sum) {
    const size_t size = size_of(type);
    floats most = {0};
    int64_t k = 0;
    for (; k + LANES <= count; k += LANES) most = larger_of((floats)((integers)take(from + k * size, type) & INT32_MAX), most);
    if (k < count) most = larger_of((floats)((integers)take_some(from + k * size, (int)(count - k), type) & INT32_MAX), most);
    const float largest = largest_of(most), step = largest / 127, inverse = largest > 0 ? 127 / largest : 0;
    integers sums = {0};
    for (k = 0; k + LANES <= count; k += LANES) {
        const narrow_codes narrow = to_codes(take(from + k * size, type) * inverse, &sums);
        memcpy(to + k, &narrow, sizeof narrow);
    }
    if (k < count) {
        const narrow_codes narrow = to_codes(take_some(from + k * size, (int)(count - k), type) * inverse, &sums);
        memcpy(to + k, &narrow, count - k);
    }
    *sum = 0;
    for (int i = 0; i < LANES; i++) *sum += sums[i];
    return step;
}

/* Bytes 0 2 4 6 of eight in the lower half, the others in the upper. */
INLINE uint64_t even_and_odd(uint64_t x) {
    uint64_t even = x & 0x00ff00ff00ff00ff, odd = x >> 8 & 0x00ff00ff00ff00ff;
    even = (even | even >> 8) & 0x0000ffff0000ffff, odd = (odd | odd >> 8) & 0x0000ffff0000ffff;
    return ((even | even >> 16) & 0xffffffff) | (odd | odd >> 16) << 32;
}

/* Quantised inputs, zeros from `count` on up to a whole word, as operands `stride` words apart. */
INLINE void pack_inputs(const int8_t *codes, int64_t count, enum kind kind, uint32_t *to, int64_t stride) {
    int64_t k = 0;
    if (kind == BYTES && !DOTS_OF_BYTES)
        for (; k + 4 * LANES <= count; k += 4 * LANES) {
            words read, operands[2];
            memcpy(&read, codes + k, sizeof read);
            unpack(read, kind, operands);
            UNROLL for (int i = 0; i < LANES; i++, to += 2 * stride) to[0] = operands[0][i], to[stride] = operands[1][i];
        }
    for (; k < count; k += inputs_of(kind)) {
        uint32_t pair[2];
        if (kind == NIBBLES) {
            uint64_t eight;
            memcpy(&eight, codes + k, sizeof eight);
            eight = even_and_odd(eight);
            memcpy(pair, &eight, sizeof pair);
        } else if (DOTS_OF_BYTES) {
            memcpy(pair, codes + k, sizeof *pair);
        } else {
            const int8_t *four = codes + k;
            pair[0] = (uint16_t)four[0] | (uint32_t)(uint16_t)four[2] << 16;
            pair[1] = (uint16_t)four[1] | (uint32_t)(uint16_t)four[3] << 16;
        }
        for (int i = 0; i < operands_of(kind); i++, to += stride) *to = pair[i];
    }
}
