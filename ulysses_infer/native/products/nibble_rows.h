/* Products of a few rows with nibbles along the inputs: the lanes are consecutive inputs of one output.
 *
 * An atom, 32 inputs, is 16 bytes of nibbles: four lanes of sums, which share a scale. As many atoms as there are lanes
 * are a block, whose scales are one vector. Nothing is transposed. Rows of the weight are read one after another or, with
 * enough registers, in streams. With more rows of inputs, lanes that are outputs cost less.
 */
#pragma once
#include "integer_rows.h"

#define ATOM 32
#define ATOM_BYTES (ATOM / 2)
#define VECTOR_ATOMS (LANES / 4)
#define BLOCK_VECTORS 4
#define BLOCK_ATOMS (BLOCK_VECTORS * VECTOR_ATOMS)
#define BLOCK_INPUTS (BLOCK_ATOMS * ATOM)
#define AHEAD_BYTES 16384 /* of the weight, which are fetched before they are needed */
#define AHEAD_IN_STREAM 2048
#define ROWS_TOGETHER (REGISTERS == 32 ? 4 : 2) /* or fewer rows in several streams */
#define NIBBLE_STREAMS (LANES == 16 ? 4 : 1)    /* at most ROWS_TOGETHER */

/* Quantised inputs, zeros after the last, and where those of the weight are. */
struct nibble_rows {
    const struct product *p;
    int8_t *codes;        /* [rows][atoms / VECTOR_ATOMS][2][4 * LANES]: the even inputs of a vector, then the odd ones */
    float *scales, *sums; /* [rows][atoms by lanes]; sums: of the inputs themselves, a segment's at its first atom */
    int64_t atoms;        /* of a row, whole blocks */
    int64_t groups, step; /* of a row of the weight; from one block to the next */
    int64_t ahead;        /* outputs */
    integers index, last; /* of the group of each lane of a block, counted from the first; of the last, partial block */
};

/* The sums of a block can be added up to one lane per atom before they are converted. */
#define ADDS_UP (NARROW_SUMS || LANES == 16)

/* Which atom of a block a lane belongs to, and the reverse. */
INLINE int atom_of(int lane) { return ADDS_UP ? lane % 4 * VECTOR_ATOMS + lane / 4 : lane; }
INLINE int64_t lane_of(int64_t atom) { return ADDS_UP ? atom % VECTOR_ATOMS * 4 + atom / VECTOR_ATOMS : atom; }

/* Whether these products can multiply the weight. */
static int has_nibble_rows(const struct stored *w) {
    const int in_place = w->values == PACKED && reading_of(w) == NIBBLE_WORDS && w->first_input % ATOM == 0;
    const int has_groups = w->group_size && w->group_size % ATOM == 0 && BLOCK_INPUTS % w->group_size == 0;
    const int has_scales = w->scale_outputs == 1 && w->scale_type != EXPONENTS && w->scale_input == 1;
    const int has_zeros = !w->zeros || (w->float_zeros && w->zero_input == 1);
    return HAS_NIBBLES && in_place && has_groups && has_scales && has_zeros && w->segment % ATOM == 0;
}

/* `codes` and what follows them are taken from `memory`, `nibble_bytes` of it. */
static int64_t nibble_bytes(const struct product *p) {
    const int64_t blocks = (p->weight->inputs + BLOCK_INPUTS - 1) / BLOCK_INPUTS;
    return p->num_rows * blocks * BLOCK_ATOMS * (ATOM + 2 * (int64_t)sizeof(float));
}

static struct nibble_rows nibble_rows_of(const struct product *p, char *memory) {
    const struct stored *w = p->weight;
    const int64_t phase = w->first_input % w->group_size, bytes = w->code_output > 0 ? w->code_output : AHEAD_BYTES;
    struct nibble_rows x = {.p = p, .codes = (int8_t *)memory, .step = BLOCK_INPUTS / w->group_size};
    x.atoms = (w->inputs + BLOCK_INPUTS - 1) / BLOCK_INPUTS * BLOCK_ATOMS;
    x.scales = (float *)(memory + p->num_rows * x.atoms * ATOM), x.sums = x.scales + p->num_rows * x.atoms;
    x.groups = (phase + w->inputs + w->group_size - 1) / w->group_size;
    x.ahead = (AHEAD_BYTES + bytes - 1) / bytes;
    const int left = (int)(x.groups - w->inputs / BLOCK_INPUTS * x.step);
    for (int i = 0; i < LANES; i++) {
        x.index[i] = (int)((phase + atom_of(i) * ATOM) / w->group_size);
        x.last[i] = x.index[i] < left ? x.index[i] : left - 1;
    }
    return x;
}

/* Where the scale of an atom is. */
INLINE int64_t place_of(int64_t atom) { return atom / BLOCK_ATOMS * BLOCK_ATOMS + lane_of(atom % BLOCK_ATOMS); }

/* Quantise the inputs of all rows. narrow: room for a segment. */
static void quantise_for_nibbles(const struct nibble_rows *x, int8_t *narrow) {
    const struct product *p = x->p;
    memset(x->codes, 0, nibble_bytes(p));
    for (int64_t t = 0; t < p->num_rows; t++)
        for (const struct segment *s = p->segments; s < p->segments + p->num_segments; s++) {
            const int64_t count = s->stop - s->start, first = t * x->atoms + s->start / ATOM;
            const char *from = p->inputs + (t * p->inputs_stride + s->start) * size_of(p->type);
            int32_t sum;
            const float scale = quantise(from, count, p->type, narrow, &sum);
            memset(narrow + count, 0, 8);
            x->sums[place_of(first)] = scale * (float)sum;
            for (int64_t k = 0; k < count; k += 8) {
                const int64_t atom = first + k / ATOM, lane = atom % VECTOR_ATOMS;
                int8_t *to = x->codes + (atom - lane) * ATOM + lane * ATOM_BYTES + k % ATOM / 2;
                uint64_t eight;
                memcpy(&eight, narrow + k, sizeof eight);
                eight = even_and_odd(eight);
                memcpy(to, &eight, 4), memcpy(to + 4 * LANES, (const char *)&eight + 4, 4);
                x->scales[place_of(atom)] = scale;
            }
        }
}

/* Up to LANES numbers; what is not read is zero. */
INLINE floats take_scales(const char *from, int64_t count, enum type type) {
    if (count >= LANES) return take(from, type);
    const words some = load_bytes(from, count * size_of(type));
    return take(&some, type);
}

/* A quarter of a block: sums of 16 bits, or four lanes hold the sums of an atom. */
INLINE words multiply_nibbles(const words weights[2], const int8_t *inputs) {
    words even, odd;
    memcpy(&even, inputs, sizeof even), memcpy(&odd, inputs + sizeof even, sizeof odd);
#if NARROW_SUMS
    return (words)narrow_dot(narrow_dot((shorts){0}, even, weights[0]), odd, weights[1]);
#else
    return (words)dot(dot((integers){0}, even, weights[0]), odd, weights[1]);
#endif
}

/* The numbers of the group of each lane; `index` counts from the first one, of which `count` can be read. */
INLINE floats of_groups(const char *from, int64_t count, enum type type, integers index) {
#if defined(__AVX2__) && LANES == 8
    if (type == BFLOAT16) { /* one shuffle converts, too */
        const words places = (words)index * 0x02020000 + 0x01008080;
        __m128i read;
        if (count >= LANES)
            read = _mm_loadu_si128((const __m128i *)from);
        else
            read = _mm256_castsi256_si128((__m256i)load_bytes(from, count * sizeof(bfloat16)));
        return (floats)_mm256_shuffle_epi8(_mm256_broadcastsi128_si256(read), (__m256i)places);
    }
#endif
    return permuted(take_scales(from, count, type), index);
}

#if ADDS_UP
/* The sums of the products of a block, of one atom per lane. All sums of pairs of lanes are below 16 * 15 * 127. */
INLINE floats add_up(const words quarters[BLOCK_VECTORS]) {
#ifdef HAS_AVX512
    const __m512i ones = _mm512_set1_epi16(1);
    __m512i q[BLOCK_VECTORS];
    UNROLL for (int v = 0; v < BLOCK_VECTORS; v++)
        q[v] = NARROW_SUMS ? _mm512_madd_epi16((__m512i)quarters[v], ones) : (__m512i)quarters[v];
    const __m512i first = _mm512_madd_epi16(_mm512_packs_epi32(q[0], q[1]), ones);
    const __m512i second = _mm512_madd_epi16(_mm512_packs_epi32(q[2], q[3]), ones);
    const words whole = (words)_mm512_packs_epi32(first, second);
#elif LANES == 8
    const __m256i first = _mm256_hadd_epi16((__m256i)quarters[0], (__m256i)quarters[1]);
    const __m256i second = _mm256_hadd_epi16((__m256i)quarters[2], (__m256i)quarters[3]);
    const words whole = (words)_mm256_hadd_epi16(first, second);
#else
    const __m128i first = _mm_hadd_epi16((__m128i)quarters[0], (__m128i)quarters[1]);
    const __m128i second = _mm_hadd_epi16((__m128i)quarters[2], (__m128i)quarters[3]);
    const words whole = (words)_mm_hadd_epi16(first, second);
#endif
    return __builtin_convertvector(pair_dot((integers){0}, whole, (words){0} + 0x00010001), floats);
}
#endif

/* sums + scales * (the products of a block * inputs_scales - zeros * inputs_sums). Scales, zeros and what is of the inputs
 * have one atom per lane. */
INLINE floats add_atoms(floats sums, const words quarters[BLOCK_VECTORS], floats scales, floats zeros,
                        floats inputs_scales, floats inputs_sums) {
#if ADDS_UP
    return sums + scales * (add_up(quarters) * inputs_scales - zeros * inputs_sums);
#else
#if NARROW_SUMS
    const words ones = (words){0} + 0x00010001;
#endif
    sums -= scales * zeros * inputs_sums;
    scales *= inputs_scales;
    UNROLL for (int v = 0; v < BLOCK_VECTORS; v++) {
        integers atoms;
        UNROLL for (int i = 0; i < LANES; i++) atoms[i] = v * VECTOR_ATOMS + i / 4;
#if NARROW_SUMS
        const integers whole = pair_dot((integers){0}, quarters[v], ones);
#else
        const integers whole = (integers)quarters[v];
#endif
        sums += __builtin_convertvector(whole, floats) * permuted(scales, atoms);
    }
    return sums;
#endif
}

/* A row of the weight, and which of its groups are read. */
struct nibble_row {
    const char *codes, *scales, *zeros;
    enum type type; /* of the scales */
    float zero;     /* the zero point, if `zeros` is null */
    int64_t ahead;  /* bytes of codes */
};

/* Block number `block` of a row of the weight per stream, times rows t .. t + rows. bytes: of nibbles that the block has;
 * index: of the group of each lane; groups: how many can be read. is_usual: scales and zero points are in bfloat16.
 * sums: [streams][rows]. */
INLINE void add_block(const struct nibble_rows *x, const struct nibble_row *w, int64_t t, int64_t block, int64_t bytes,
                      integers index, int64_t groups, const int is_usual, const int streams, const int rows,
                      floats *sums) {
    const int64_t first = t * x->atoms + block * BLOCK_ATOMS, vector = 4 * LANES, group = block * x->step;
    const enum type type = is_usual ? BFLOAT16 : w->type;
    words quarters[ROWS_TOGETHER][BLOCK_VECTORS] = {{{0}}};
    UNROLL for (int v = 0; v < BLOCK_VECTORS; v++) {
        if (v * vector >= bytes) break;
        UNROLL for (int s = 0; s < streams; s++) {
            const char *codes = w[s].codes + block * BLOCK_ATOMS * ATOM_BYTES + v * vector;
            words weights[2];
            if (v * vector % LINE == 0) __builtin_prefetch(codes + w->ahead, 0, 2);
            unpack(load_bytes(codes, bytes - v * vector), NIBBLES, weights);
            UNROLL for (int r = 0; r < rows; r++)
                quarters[s * rows + r][v] =
                    multiply_nibbles(weights, x->codes + (first + r * x->atoms + v * VECTOR_ATOMS) * ATOM);
        }
    }
    UNROLL for (int s = 0; s < streams; s++) {
        const floats scales = of_groups(w[s].scales + group * size_of(type), groups, type, index);
        floats zeros = splat(w->zero);
        if (is_usual || w->zeros) zeros = of_groups(w[s].zeros + group * sizeof(bfloat16), groups, BFLOAT16, index);
        UNROLL for (int r = 0; r < rows; r++) {
            const int64_t place = first + r * x->atoms;
            sums[s * rows + r] = add_atoms(sums[s * rows + r], quarters[s * rows + r], scales, zeros,
                                           take(x->scales + place, FLOAT32), take(x->sums + place, FLOAT32));
        }
    }
}

/* A row of the weight per stream, times rows t .. t + rows. is_inside: LANES groups can be read from any one on. */
INLINE void add_row(const struct nibble_rows *x, const struct nibble_row *w, int64_t t, int64_t inputs, int is_inside,
                    const int streams, const int rows, floats *sums) {
    const int64_t whole = inputs / BLOCK_INPUTS, rest = (inputs % BLOCK_INPUTS + 1) / 2;
    UNROLL for (int i = 0; i < streams * rows; i++) sums[i] = (floats){0};
    if (is_inside && w->zeros && w->type == BFLOAT16)
        for (int64_t b = 0; b < whole; b++)
            add_block(x, w, t, b, BLOCK_INPUTS / 2, x->index, LANES, 1, streams, rows, sums);
    else
        for (int64_t b = 0; b < whole; b++) {
            const int64_t groups = is_inside ? LANES : x->groups - b * x->step;
            add_block(x, w, t, b, BLOCK_INPUTS / 2, x->index, groups, 0, streams, rows, sums);
        }
    if (rest)
        add_block(x, w, t, whole, rest, x->last, is_inside ? LANES : x->groups - whole * x->step, 0, streams, rows, sums);
}

/* Row n of the weight. */
INLINE struct nibble_row nibble_row_of(const struct stored *w, int64_t n) {
    const enum type type = w->scale_type == FLOATS ? FLOAT32 : BFLOAT16;
    return (struct nibble_row){w->codes + n * w->code_output, w->scales + n * w->scale_output * size_of(type),
                               w->zeros ? w->zeros + n * w->zero_output * sizeof(bfloat16) : 0, type, (float)w->zero, 0};
}

/* Outputs of `streams` streams of a task, from number `stream` on, of rows t .. t + rows. */
INLINE void nibble_tile(const struct nibble_rows *given, const struct task *task, int stream, int64_t t, const int streams,
                        const int rows) {
    const struct nibble_rows x = *given;
    const struct stored *w = x.p->weight;
    const int64_t inputs = w->inputs, outputs = w->outputs, count = count_of(task, stream);
    const int64_t least = w->zeros && w->zero_output < w->scale_output ? w->zero_output : w->scale_output;
    const int is_slice = w->code_output * 2 != inputs; /* the CPU does not foresee where its next row begins */
    const int64_t ahead = streams == 1 ? x.ahead * w->code_output : is_slice ? w->code_output : AHEAD_IN_STREAM;
    float sums[NIBBLE_STREAMS][ROWS_TOGETHER * OUTPUTS];
    for (int64_t a = 0; a < count; a += 4) {
        floats four[4][ROWS_TOGETHER];
        for (int64_t i = 0; i < 4; i++) {
            struct nibble_row row[NIBBLE_STREAMS];
            UNROLL for (int s = 0; s < streams; s++) {
                row[s] = nibble_row_of(w, output_of(task, stream + s, a + i));
                row[s].ahead = ahead;
            }
            if (streams == 1) {
                __builtin_prefetch(row->scales + x.ahead * w->scale_output * size_of(row->type), 0, 2);
                __builtin_prefetch(row->zeros + x.ahead * w->zero_output * sizeof(bfloat16), 0, 2);
            }
            const int64_t beyond = outputs - 1 - output_of(task, stream + streams - 1, a + i); /* the last of these rows */
            add_row(&x, row, t, inputs, beyond * least >= LANES, streams, rows, four[i]);
        }
        UNROLL for (int s = 0; s < streams; s++)
            UNROLL for (int r = 0; r < rows; r++) {
                const int j = s * rows + r;
                sum_four(sums[s] + r * OUTPUTS + a, four[0][j], four[1][j], four[2][j], four[3][j]);
            }
    }
    for (int s = 0; s < streams && stream + s < task->streams; s++)
        put_sums(x.p, t, rows, task->first + (stream + s) * task->apart, count_of(task, stream + s), sums[s]);
}

/* Rows t .. t + rows with all outputs of a task: the fewer rows, the more streams. */
INLINE void nibble_tiles(const struct nibble_rows *x, const struct task *task, int64_t t, const int rows) {
    const int streams = rows < NIBBLE_STREAMS ? NIBBLE_STREAMS / rows : 1;
    for (int s = 0; s < task->streams; s += streams) nibble_tile(x, task, s, t, streams, rows);
}

/* All rows with the outputs of a task. */
static void nibble_outputs(const struct nibble_rows *x, const struct task *task) {
    const int64_t all = x->p->num_rows;
    for (int64_t t = 0, rows; t < all; t += rows) {
        rows = all - t < ROWS_TOGETHER ? all - t : ROWS_TOGETHER;
        switch (rows) {
            case 1: nibble_tiles(x, task, t, 1); break;
            case 2: nibble_tiles(x, task, t, 2); break;
#if REGISTERS == 32
            case 3: nibble_tiles(x, task, t, 3); break;
            case 4: nibble_tiles(x, task, t, 4); break;
#endif
        }
    }
}
