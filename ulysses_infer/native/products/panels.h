/* Products of many rows at the rate of float32 multiply-adds, from weights of any format.
 *
 * Each vector lane holds one input row, so no sum crosses lanes. The inputs are converted to float32 and transposed
 * once. A task is a group of weight rows. It converts DEPTH elements of each of them to float32, which then stay in the
 * L2 cache, and multiplies them with all blocks of inputs, one of which stays in the L1 cache. Sums run over k in order,
 * for any number of rows.
 */
#pragma once
#include <stdlib.h>

#include "product.h"
#include "tasks.h"

#define DEPTH 256      /* elements of a weight row that are converted at a time */
#define TASK_ROWS 48   /* weight rows of a task, at most */
#define TASK_UNIT (REGISTERS == 32 ? 48 : 3 * LANES) /* of which it has: whole tiles and whole vectors of outputs */
#define MOST_LANES 512 /* input rows at a time; bounds the memory of a task's sums */
#define MOST_WIDE 3    /* vectors of inputs of a block */
#define MOST_JOINT 3   /* products of the same inputs */

/* Weight rows of a tile whose sums, with `vectors` of inputs, fill the registers. */
INLINE int tile_rows(const int vectors) {
    return vectors == 1 ? REGISTERS / 2 - (REGISTERS == 16 ? -4 : 0) : vectors == 2 ? 3 * REGISTERS / 8 : REGISTERS / 4;
}

/* Write elements k .. k + count of weight row n as float32. */
typedef void (*widener)(const struct product *p, int64_t n, int64_t k, int64_t count, float *to);

/* Transposed inputs of `rows` rows in blocks of 1 to MOST_WIDE vectors: [block][width][vectors * LANES]. */
struct columns {
    float *values;
    int64_t rows, vectors, blocks;
};

/* The first vector of a block; blocks are of nearly equal size. */
INLINE int64_t first_of(const struct columns *x, int64_t block) { return x->vectors * block / x->blocks; }

/* Convert and transpose a block of inputs; lanes without a row are zero. */
INLINE void transpose_block(const struct product *p, const struct columns *x, int64_t block, enum type type) {
    const int64_t first = first_of(x, block), vectors = first_of(x, block + 1) - first, wide = vectors * LANES;
    const size_t size = size_of(type);
    for (int64_t v = 0; v < vectors; v++) {
        const int64_t row = (first + v) * LANES, rows = x->rows - row < LANES ? x->rows - row : LANES;
        const char *from = p->inputs + row * p->inputs_stride * size;
        float *to = x->values + first * LANES * p->width + v * LANES;
        for (int64_t k = 0; k < p->width; k += LANES, to += LANES * wide, from += LANES * size) {
            const int count = p->width - k < LANES ? (int)(p->width - k) : LANES;
            floats square[LANES];
            UNROLL for (int i = 0; i < LANES; i++)
                square[i] = i < rows ? take_some(from + i * p->inputs_stride * size, count, type) : (floats){0};
            transpose_square(square);
            if (count == LANES)
                UNROLL for (int i = 0; i < LANES; i++) memcpy(to + i * wide, &square[i], sizeof *square);
            else
                for (int i = 0; i < count; i++) memcpy(to + i * wide, &square[i], sizeof *square);
        }
    }
}

/* Lines of weight rows to prefetch meanwhile, `bytes` apart. */
struct ahead_of {
    const char *rows;
    int64_t bytes, count;
};

/* sums[rows][vectors * LANES] += `depth` elements of weight rows, DEPTH apart, times the inputs. */
INLINE void add_tile_of(const float *x, const int vectors, const float *weight, const int rows, int64_t depth,
                        float *sums, struct ahead_of ahead, const size_t size) {
    floats held[REGISTERS][MOST_WIDE];
    UNROLL for (int i = 0; i < rows; i++)
        UNROLL for (int v = 0; v < vectors; v++)
            memcpy(&held[i][v], sums + (i * vectors + v) * LANES, sizeof(floats));
    const int64_t line = LINE / size;
    for (int64_t start = 0; start < depth; start += line) {
        const int64_t stop = start + line < depth ? start + line : depth;
        for (int64_t i = 0; i < ahead.count; i++) __builtin_prefetch(ahead.rows + i * ahead.bytes + start * size, 0, 2);
        UNROLL_SOME for (int64_t k = start; k < stop; k++, x += vectors * LANES) {
            floats row[MOST_WIDE];
            UNROLL for (int v = 0; v < vectors; v++) row[v] = in_register(take(x + v * LANES, FLOAT32));
            UNROLL for (int i = 0; i < rows; i++) {
                const floats all = to_all_lanes(weight + i * DEPTH + k);
                UNROLL for (int v = 0; v < vectors; v++) held[i][v] = multiply_add(held[i][v], row[v], all, FLOAT32);
            }
        }
    }
    UNROLL for (int i = 0; i < rows; i++)
        UNROLL for (int v = 0; v < vectors; v++)
            memcpy(sums + (i * vectors + v) * LANES, &held[i][v], sizeof(floats));
}

/* All tiles of a task with one block of inputs. */
INLINE void add_block_of(const float *x, const int vectors, const float *weight, int64_t count, int64_t depth,
                         float *sums, struct ahead_of ahead, const size_t size) {
    const int rows = tile_rows(vectors);
    const int64_t all = ahead.count;
    for (int64_t i = 0; i < count; i += rows) {
        const int64_t left = all - i;
        ahead.count = left < 0 ? 0 : left < rows ? left : rows;
        add_tile_of(x, vectors, weight + i * DEPTH, rows, depth, sums + i * vectors * LANES, ahead, size);
        ahead.rows += rows * ahead.bytes;
    }
}

/* Add the bias to the sums of `count` weight rows with a block of inputs, round, and store. */
INLINE void put_block(const struct product *p, const float *sums, int64_t vectors, int64_t row, int64_t rows, int64_t n,
                      int64_t count, enum type type) {
    const int64_t wide = vectors * LANES, stride = p->outputs_stride;
    for (int64_t v = 0; v < vectors && v * LANES < rows; v++)
        for (int64_t i = 0; i < count; i += LANES) {
            const int64_t left = rows - v * LANES, part = count - i < LANES ? count - i : LANES;
            floats square[LANES], bias = {0};
            UNROLL for (int j = 0; j < LANES; j++) memcpy(&square[j], sums + (i + j) * wide + v * LANES, sizeof(floats));
            transpose_square(square);
            if (p->bias) bias = take_some(p->bias + (n + i) * size_of(type), (int)part, type);
            char *to = p->outputs + ((row + v * LANES) * stride + n + i) * size_of(type);
            UNROLL for (int t = 0; t < LANES; t++)
                if (t < left) {
                    if (part == LANES)
                        give(to + t * stride * size_of(type), square[t] + bias, type);
                    else
                        give_some(to + t * stride * size_of(type), square[t] + bias, (int)part, type);
                }
        }
}

/* The inputs that the block after this one reads. */
INLINE struct ahead_of after_block(const struct product *p, const struct columns *x, int64_t block, int64_t k,
                                   int64_t depth, const size_t size) {
    const int64_t first = first_of(x, block + 1), vectors = block + 1 < x->blocks ? first_of(x, block + 2) - first : 0;
    const float *values = x->values + first * LANES * p->width + k * vectors * LANES;
    return (struct ahead_of){(const char *)values, depth * size, vectors * LANES * sizeof *values / size};
}

/* `count` weight rows from n on, at most TASK_ROWS, with all inputs. `memory`: weight[TASK_ROWS][DEPTH], then
 * sums[block][TASK_ROWS][vectors * LANES]. `bytes` is from one stored weight row to the next, `size` that of an element,
 * rounded up to whole bytes; `type` is that of inputs, bias and outputs. */
INLINE void run_group(const struct product *p, const struct columns *x, int64_t n, int64_t count, float *memory,
                      const widener widen, int64_t bytes, const size_t size, enum type type) {
    const int64_t left = p->num_outputs - n - count, after = left < count ? left : count;
    float *weight = memory, *sums = memory + TASK_ROWS * DEPTH;
    memset(sums, 0, TASK_ROWS * x->vectors * LANES * sizeof *sums);
    memset(weight + count * DEPTH, 0, (TASK_ROWS - count) * DEPTH * sizeof *weight);
    for (int64_t k = 0; k < p->width; k += DEPTH) {
        const int64_t depth = p->width - k < DEPTH ? p->width - k : DEPTH;
        for (int64_t i = 0; i < count; i++) widen(p, n + i, k, depth, weight + i * DEPTH);
        struct ahead_of ahead = {p->weight + n * bytes + (k + DEPTH) * size, bytes, count};
        if (k + DEPTH >= p->width) ahead = (struct ahead_of){p->weight + (n + count) * bytes, bytes, after};
        for (int64_t block = 0; block < x->blocks; block++) {
            const int64_t first = first_of(x, block), vectors = first_of(x, block + 1) - first;
            const float *values = x->values + first * LANES * p->width + k * vectors * LANES;
            if (block) ahead = after_block(p, x, block, k, depth, size);
            float *to = sums + first * LANES * TASK_ROWS;
            switch (vectors) {
                case 1: add_block_of(values, 1, weight, count, depth, to, ahead, size); break;
                case 2: add_block_of(values, 2, weight, count, depth, to, ahead, size); break;
                default: add_block_of(values, MOST_WIDE, weight, count, depth, to, ahead, size);
            }
        }
    }
    for (int64_t block = 0; block < x->blocks; block++) {
        const int64_t first = first_of(x, block), vectors = first_of(x, block + 1) - first;
        put_block(p, sums + first * LANES * TASK_ROWS, vectors, first * LANES, x->rows - first * LANES, n, count, type);
    }
}

/* `transpose_block` and `run_group` for constant types: the compiler does not pass constants into parallel regions. */
struct panel_kernel {
    void (*transpose)(const struct product *p, const struct columns *x, int64_t block);
    void (*run)(const struct product *p, const struct columns *x, int64_t n, int64_t count, float *memory);
    size_t size; /* of an element of inputs and outputs */
};

/* Tasks of a product: as many for each of the threads, of nearly equal size. */
INLINE int64_t panel_tasks(const struct product *p, int64_t threads) {
    const int64_t least = (p->num_outputs + TASK_ROWS - 1) / TASK_ROWS;
    return (least + threads - 1) / threads * threads;
}

/* The first output of a task. */
INLINE int64_t first_output(int64_t outputs, int64_t task, int64_t tasks) {
    const int64_t start = (outputs + TASK_UNIT - 1) / TASK_UNIT * task / tasks * TASK_UNIT;
    return start < outputs ? start : outputs;
}

/* Products of the same inputs. Their tasks follow one another; those of product i begin at starts[i]. */
struct joint {
    const struct product *of;
    int64_t count, starts[MOST_JOINT + 1];
    struct tasks tasks;
};

INLINE struct joint joint_of(const struct product *of, int64_t count) {
    struct joint j = {of, count, {0}, {0}};
    struct product all = of[0];
    for (int64_t i = 1; i < count; i++) all.num_outputs += of[i].num_outputs;
    const int64_t threads = threads_for(is_large(&all));
    for (int64_t i = 0; i < count; i++) j.starts[i + 1] = j.starts[i] + panel_tasks(&of[i], threads);
    j.tasks = tasks_of(j.starts[count], threads);
    return j;
}

/* A task, for the rows of inputs from `row` on that `x` holds. `memory` is this thread's. */
INLINE void run_task(const struct joint *j, int64_t task, const struct columns *x, int64_t row,
                     const struct panel_kernel *kernel, float *memory) {
    int64_t i = 0;
    while (task >= j->starts[i + 1]) i++;
    struct product p = j->of[i];
    const int64_t tasks = j->starts[i + 1] - j->starts[i], n = first_output(p.num_outputs, task - j->starts[i], tasks);
    const int64_t count = first_output(p.num_outputs, task - j->starts[i] + 1, tasks) - n;
    p.outputs += row * p.outputs_stride * kernel->size;
    if (count) kernel->run(&p, x, n, count, memory);
}

/* In a parallel region: the rows of inputs from `row` on that `x` holds. `memory` is this thread's. */
INLINE void run_part(const struct joint *j, const struct columns *x, int64_t row, const struct panel_kernel *kernel,
                     float *memory) {
    struct product p = j->of[0];
    p.inputs += row * p.inputs_stride * kernel->size;
    if (omp_get_thread_num() == 0) share(&j->tasks);
#pragma omp for schedule(static)
    for (int64_t block = 0; block < x->blocks; block++) kernel->transpose(&p, x, block);
    for (int64_t task; (task = take_task(&j->tasks)) >= 0;)
        if (memory) run_task(j, task, x, row, kernel, memory);
#pragma omp barrier
}

/* `count` products of the same inputs, at most MOST_JOINT. Returns 0 if out of memory. */
static int multiply_panels(const struct product *p, int64_t count, const struct panel_kernel *kernel) {
    const int64_t parts = (p->num_rows + MOST_LANES - 1) / MOST_LANES, most = (p->num_rows + parts - 1) / parts;
    const int64_t lanes = (most + LANES - 1) / LANES * LANES;
    float *values = aligned_alloc(LINE, (lanes * p->width * sizeof *values + LINE - 1) / LINE * LINE);
    if (!values) return 0;
    const struct joint j = joint_of(p, count);
    int failed = 0;
#pragma omp parallel if (j.tasks.threads > 1)
    {
        float *memory = aligned_alloc(LINE, TASK_ROWS * (DEPTH + lanes) * sizeof *memory);
        if (!memory) failed = 1;
        for (int64_t row = 0; row < p->num_rows; row += most) {
            const int64_t rows = p->num_rows - row < most ? p->num_rows - row : most, vectors = (rows + LANES - 1) / LANES;
            const struct columns x = {values, rows, vectors, (vectors + MOST_WIDE - 1) / MOST_WIDE};
            run_part(&j, &x, row, kernel, memory);
        }
        free(memory);
    }
    free(values);
    return !failed;
}

/* A row that is stored in `type`. */
INLINE void widen_as(const struct product *p, int64_t n, int64_t k, int64_t count, float *to, enum type type) {
    const char *from = p->weight + (n * p->weight_stride + k) * size_of(type);
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES) {
        const floats wide = take(from + i * size_of(type), type);
        memcpy(to + i, &wide, sizeof wide);
    }
    for (; i < count; i++) to[i] = one_of(from, i, type);
}

/* What kernels for few and for many rows read of weights whose rows are stored in `type`, for constant types. */
#define STORED_ROWS(name, type)                                                                              \
    static void few_rows_of_##name(const struct product *p, int64_t group) { few_rows_of(p, group, type); }  \
    INLINE void widen_##name(const struct product *p, int64_t n, int64_t k, int64_t count, float *to) {      \
        widen_as(p, n, k, count, to, type);                                                                  \
    }                                                                                                        \
    static void transpose_##name(const struct product *p, const struct columns *x, int64_t block) {          \
        transpose_block(p, x, block, type);                                                                  \
    }                                                                                                        \
    static void run_##name(const struct product *p, const struct columns *x, int64_t n, int64_t count,       \
                           float *memory) {                                                                  \
        const size_t size = size_of(type);                                                                   \
        run_group(p, x, n, count, memory, widen_##name, p->weight_stride * size, size, type);                \
    }
