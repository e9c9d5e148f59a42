/* Short convolutions of own channels, for all tokens of some sequences: with SiLU (Mamba), or between two factors (LFM). */
#include "short_convolution.h"

#include "call.h"

struct short_convolution {
    struct convolution conv;
    const void *input, *before, *after; /* factors of the input and of the result, or NULL */
    int64_t row;                        /* elements between tokens of these three */
    int64_t sequences, length;
    const int64_t *slots; /* [sequences] */
    float *scratch;       /* floats_of_short_convolution */
    void *out;            /* [sequences * length, channels] */
};

/* Once: the weight. Per sequence: its last inputs; per token: its input, if that is a product, and its result. */
int64_t floats_of_short_convolution(const struct short_convolution *args) {
    return weight_floats(&args->conv) + args->sequences * past_floats(&args->conv) +
           2 * args->sequences * args->length * args->conv.channels;
}

/* to = a * b, rounded. */
INLINE void multiply(void *to, const void *a, const void *b, int64_t width, enum type type) {
    for (int64_t c = 0; c < width; c += LANES)
        give((char *)to + c * size_of(type), take(element(a, c, type), type) * take(element(b, c, type), type), type);
}

/* The result, its second factor, and the type of the output. */
INLINE void finish_token(const struct short_convolution *args, const float *result, int64_t token, enum type type) {
    const int64_t channels = args->conv.channels;
    char *out = (char *)args->out + token * channels * size_of(type);
    for (int64_t c = 0; c < channels; c += LANES) {
        floats value = take(result + c, FLOAT32);
        if (args->after) value *= take(element(args->after, token * args->row + c, type), type);
        give(out + c * size_of(type), value, type);
    }
}

INLINE void run(const struct short_convolution *args, enum type type) {
    const struct convolution *conv = &args->conv;
    const int64_t length = args->length, channels = conv->channels, tokens = args->sequences * length;
    float *weight = args->scratch, *pasts = weight + weight_floats(conv);
    float *results = pasts + args->sequences * past_floats(conv), *products = results + tokens * channels;
    const struct fed fed = args->before ? (struct fed){products, channels, 0, 0} : (struct fed){args->input, args->row, 0, 0};
    const struct channels all = {0, 1, 1, channels};
    weight_by_taps(conv, weight, type);
#pragma omp parallel
    {
        if (args->before)
#pragma omp for schedule(static)
            for (int64_t token = 0; token < tokens; token++)
                multiply(
                    (char *)products + token * channels * size_of(type), element(args->before, token * args->row, type),
                    element(args->input, token * args->row, type), channels, type);
#pragma omp for schedule(static)
        for (int64_t sequence = 0; sequence < args->sequences; sequence++) {
            float *past = pasts + sequence * past_floats(conv);
            recall(conv, args->slots[sequence], past, type);
            remember(conv, args->slots[sequence], past, &fed, all, sequence * length, length, type);
        }
#pragma omp for schedule(static)
        for (int64_t token = 0; token < tokens; token++) {
            const int64_t sequence = token / length;
            const float *past = pasts + sequence * past_floats(conv);
            float *result = results + token * channels;
            if (args->after)
                convolve(conv, weight, past, &fed, all, sequence * length, token % length, result, 0, type);
            else
                convolve(conv, weight, past, &fed, all, sequence * length, token % length, result, 1, type);
            finish_token(args, result, token, type);
        }
    }
}

/* Channels are a multiple of LANES. */
void short_convolution_bf16(const struct short_convolution *args) { run(args, BFLOAT16); }
void short_convolution_f32(const struct short_convolution *args) { run(args, FLOAT32); }
CALL(short_convolution_bf16, ADDRESS(0))
CALL(short_convolution_f32, ADDRESS(0))
