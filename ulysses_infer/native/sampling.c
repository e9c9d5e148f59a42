/* Draws of random tokens: min_p, top_k and top_p by radix selection, and the token at a random number's place.
 *
 * Weights are summed as integers, so the result is that of model/sampling/draw.py and kernels/sampling.py, whatever the
 * order. Source of top_p: Holtzman et al. 2020, arXiv 1904.09751. */
#include "call.h"

#define FRACTION 1099511627776.0f /* as in arithmetic.py: 2^40, so that the product with a float is exact */
#define DIGITS 3
#define BUCKETS 1024 /* of 10 bits; the bits of a weight in [0, 1] are below 2^30, and order as weights do */
#define ANY_MASS (INT64_C(1) << 62)
#define PARALLEL_FROM 65536 /* weights; for fewer, starting threads costs more than it saves */

static const int SHIFT[DIGITS] = {20, 10, 0};

/* How a row is drawn. The same fields as in `native/sampling.py`, all of them 64-bit. */
struct options {
    double number; /* in [0, 1) */
    double size;   /* most tokens kept by top_k, at least 1 */
    double top_p;
    double min_p;
};

/* What is left of a row: weights above `least`, and the first `equal` weights that equal it. */
struct kept {
    uint32_t least;
    int64_t equal;
    int64_t mass;
};

/* The bits of a weight, 0 for one below `lowest` or NaN. */
static inline uint32_t bits_of(float weight, float lowest) {
    if (!(weight >= lowest) || !(weight > 0)) return 0;
    uint32_t bits;
    memcpy(&bits, &weight, sizeof bits);
    return bits;
}

static inline int64_t mass_of(uint32_t bits) {
    float weight;
    memcpy(&weight, &bits, sizeof weight);
    return (int64_t)(weight * FRACTION);
}

static inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

/* The greatest weights, equal ones in order of their ids: `count` of them, or as few as weigh at least `mass`. */
static struct kept greatest(const float *weights, int64_t size, float lowest, int64_t count, int64_t mass) {
    struct kept kept = {0, 0, 0};
    int64_t above = 0;
    for (int digit = 0; digit < DIGITS; digit++) {
        int64_t counts[BUCKETS] = {0}, masses[BUCKETS] = {0};
        for (int64_t i = 0; i < size; i++) {
            const uint32_t bits = bits_of(weights[i], lowest);
            if (!bits || (digit && bits >> SHIFT[digit - 1] != kept.least >> SHIFT[digit - 1])) continue;
            const uint32_t bucket = bits >> SHIFT[digit] & (BUCKETS - 1);
            counts[bucket]++, masses[bucket] += mass_of(bits);
        }
        uint32_t bucket = BUCKETS - 1;
        while (bucket > 0 && above + counts[bucket] < count && kept.mass + masses[bucket] < mass) {
            above += counts[bucket], kept.mass += masses[bucket];
            bucket--;
        }
        kept.least |= bucket << SHIFT[digit];
        kept.equal = counts[bucket];
    }
    const int64_t each = mass_of(kept.least);
    kept.equal = smaller(kept.equal, count - above);
    if (each > 0) kept.equal = smaller(kept.equal, (mass - kept.mass + each - 1) / each);
    kept.mass += kept.equal * each;
    return kept;
}

/* ceil(top_p * mass), computed as torch does. */
static inline int64_t part_of(double top_p, int64_t mass) {
    const double part = top_p * (double)mass;
    const int64_t whole = (int64_t)part;
    return whole + ((double)whole < part);
}

static int64_t draw_row(const float *weights, int64_t size, const struct options *options) {
    const float lowest = (float)options->min_p;
    struct kept kept = {0, size, 0};
    if (options->size < (double)size) {
        kept = greatest(weights, size, lowest, (int64_t)options->size, ANY_MASS);
    } else {
        for (int64_t i = 0; i < size; i++) kept.mass += mass_of(bits_of(weights[i], lowest));
    }
    if (options->top_p < 1) {
        const int64_t count = smaller((int64_t)options->size, size);
        kept = greatest(weights, size, lowest, count, part_of(options->top_p, kept.mass));
    }
    int64_t left = (int64_t)(options->number * (double)kept.mass), equal = kept.equal;
    for (int64_t i = 0; i < size; i++) {
        const uint32_t bits = bits_of(weights[i], lowest);
        if (bits < kept.least || (bits == kept.least && equal-- <= 0)) continue;
        left -= mass_of(bits);
        if (left < 0) return i;
    }
    return 0; /* no weight is positive: the caller discards the row */
}

/* weights: [rows, size] in [0, 1]; options: [rows]; tokens: [rows], the results. */
void draw(const float *weights, const struct options *options, int64_t *tokens, int64_t rows, int64_t size) {
#pragma omp parallel for if (rows * size >= PARALLEL_FROM)
    for (int64_t row = 0; row < rows; row++) tokens[row] = draw_row(weights + row * size, size, options + row);
}
CALL(draw, ADDRESS(0), ADDRESS(1), ADDRESS(2), NUMBER(3), NUMBER(4))
