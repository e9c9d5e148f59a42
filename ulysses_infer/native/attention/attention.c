/* Attention over a paged KV cache, read in place through the block table, for decodes and prompts.
 *
 * The order of sums depends only on the sequence and on how many of its tokens are computed: results depend neither on
 * other sequences nor on the number of threads.
 */
#include <stdlib.h>

#include "attention_rows.h"
#include "attention_tiles.h"
#include "call.h"

int omp_get_max_threads(void); /* clang has no omp.h of its own */

#define FEWEST_ROWS_IN_TILES (LANES == 4 ? 32 : 2 * LANES) /* per sequence and key/value head; measured */
#define ROWS_A_TASK 64          /* bounds the working set of a task to the L1 cache */
#define TILE_ROWS_A_TASK 384    /* the same in tiles, for the L2 cache */
#define TASKS_A_THREAD 4
#define STORE_A_THREAD 65536 /* least bytes per thread */

/* The most query tokens for which this is faster than torch (measured); lower on CPUs with matrix units. */
#if (LANES >= 8 || defined(__aarch64__)) && !defined(__AMX_BF16__)
const int64_t longest_query = INT64_MAX;
#else
const int64_t longest_query = 16;
#endif

/* Division of one sequence into tasks: queries and key/value heads per task. */
struct cut {
    int64_t queries, heads, tasks_a_query, tasks;
    int in_tiles;
};

/* Rows per task in tiles; fewer if threads would be idle. */
static int64_t tile_rows(const struct batch *b, const struct layer *l, int64_t s, int threads) {
    const int64_t share = b->count * b->lengths[s] * l->groups * l->heads / (TASKS_A_THREAD * threads);
    if (threads == 1 || share > TILE_ROWS_A_TASK) return TILE_ROWS_A_TASK;
    return share < ROWS_A_TASK ? ROWS_A_TASK : share;
}

static struct cut cut_of(const struct batch *b, const struct layer *l, int64_t s, int threads) {
    struct cut cut = {.heads = 1, .in_tiles = b->lengths[s] * l->groups >= FEWEST_ROWS_IN_TILES};
    const int64_t rows = cut.in_tiles ? tile_rows(b, l, s, threads) : ROWS_A_TASK;
    const int64_t most = l->groups < rows ? rows / l->groups : 1, parts = (b->lengths[s] + most - 1) / most;
    cut.queries = (b->lengths[s] + parts - 1) / parts;
    if (parts > 1) cut.queries = round_up(cut.queries * l->groups, TILE_VECTORS * LANES) / l->groups; /* whole tiles */
    if (!cut.in_tiles && (threads == 1 || b->count >= TASKS_A_THREAD * threads))
        cut.heads = most / cut.queries < l->heads ? most / cut.queries : l->heads;
    cut.tasks_a_query = (l->heads + cut.heads - 1) / cut.heads;
    cut.tasks = (b->lengths[s] + cut.queries - 1) / cut.queries * cut.tasks_a_query;
    return cut;
}

/* The kernels of a type. Separate functions, because the compiler spills more registers in a single one. */
#define KERNELS(name, type)                                                                                      \
    static APART void attend_rows_##name(const struct batch *b, const struct layer *l, int64_t s, int64_t from,  \
                                         int64_t length, int64_t first, int64_t heads, char *memory) {           \
        attend_rows(b, l, s, from, length, first, heads, memory, type);                                          \
    }                                                                                                            \
    static APART void attend_tiles_##name(const struct batch *b, const struct layer *l, int64_t s, int64_t from, \
                                          int64_t length, int64_t head, char *memory) {                          \
        attend_tiles(b, l, s, from, length, head, memory, type);                                                 \
    }
#define APART __attribute__((noinline))

KERNELS(bfloat16, BFLOAT16)
KERNELS(float32, FLOAT32)

/* Task number `task` of sequence s. The last queries, which see most, come first. */
static void run_task(const struct batch *b, const struct layer *l, int64_t s, int64_t task, int threads,
                     char *memory, enum type type) {
    const struct cut cut = cut_of(b, l, s, threads);
    const int64_t from = (cut.tasks - 1 - task) / cut.tasks_a_query * cut.queries;
    const int64_t first = task % cut.tasks_a_query * cut.heads;
    const int64_t length = b->lengths[s] - from < cut.queries ? b->lengths[s] - from : cut.queries;
    const int64_t heads = l->heads - first < cut.heads ? l->heads - first : cut.heads;
    if (cut.in_tiles)
        (type == BFLOAT16 ? attend_tiles_bfloat16 : attend_tiles_float32)(b, l, s, from, length, first, memory);
    else
        (type == BFLOAT16 ? attend_rows_bfloat16 : attend_rows_float32)(b, l, s, from, length, first, heads, memory);
}

/* Run all tasks of all sequences on all threads. Returns 0, or 1 if out of memory. */
static int run_tasks(const struct batch *b, const struct layer *l, enum type type) {
    const int threads = omp_get_max_threads();
    int64_t most_rows = 0, most_tile_rows = 0, total = 0;
    int64_t *ends = malloc(b->count * sizeof *ends); /* number of tasks up to and including a sequence */
    if (!ends) return 1;
    for (int64_t s = 0; s < b->count; s++) {
        const struct cut cut = cut_of(b, l, s, threads);
        int64_t *most = cut.in_tiles ? &most_tile_rows : &most_rows, own = cut.queries * cut.heads * l->groups;
        if (own > *most) *most = own;
        ends[s] = total += cut.tasks;
    }
    struct scratch scratch;
    struct tiles tiles;
    const size_t row_bytes = place_rows(&scratch, l, most_rows, NULL);
    const size_t tile_bytes = most_tile_rows ? place_tiles(&tiles, l, most_tile_rows, NULL, type) : 0;
    const size_t bytes = row_bytes > tile_bytes ? row_bytes : tile_bytes;
    int failed = 0;
#pragma omp parallel if (total > 1)
    {
        char *memory = aligned_alloc(LINE, bytes);
        int64_t s = 0;
#pragma omp for schedule(dynamic, 1)
        for (int64_t task = 0; task < total; task++) {
            while (ends[s] <= task) s++; /* a thread gets its tasks in order */
            if (memory)
                run_task(b, l, s, task - (s ? ends[s - 1] : 0), threads, memory, type);
            else
                failed = 1;
        }
        free(memory);
    }
    free(ends);
    return failed;
}

/* Whether sequences s and `next`, of one token more in the cache, have the same blocks up to the context of s. */
static int have_same_blocks(const struct batch *b, int64_t s, int64_t next) {
    const int64_t *one = b->tables + b->sequences[s] * b->table_stride;
    const int64_t *other = b->tables + b->sequences[next] * b->table_stride;
    const int64_t count = (b->contexts[s] + b->block_size - 1) / b->block_size;
    return b->contexts[next] == b->contexts[s] + 1 && !memcmp(one, other, count * sizeof *one);
}

/* Drafted tokens are sequences of one token, each with the table of its request. Joined, they read every key once.
 * Writes four arrays of b->count numbers to `memory`, and a batch that refers to them. */
static struct batch join_rows(const struct batch *b, int64_t *memory) {
    int64_t *rows = memory, *lengths = memory + b->count;
    int64_t *contexts = memory + 2 * b->count, *sequences = memory + 3 * b->count, count = 0;
    for (int64_t s = 0; s < b->count; s++) {
        const int64_t last = count - 1;
        const int is_next = s && b->lengths[s] == 1 && rows[last] + lengths[last] == b->rows[s];
        if (is_next && have_same_blocks(b, s - 1, s)) {
            lengths[last]++;
        } else {
            rows[count] = b->rows[s], lengths[count] = b->lengths[s];
            count++;
        }
        contexts[count - 1] = b->contexts[s], sequences[count - 1] = b->sequences[s];
    }
    return (struct batch){count, b->table_stride, b->block_size, rows, lengths, contexts, sequences, b->tables};
}

/* Attend for all sequences. Returns 0, or 1 if out of memory. */
static int attend(const struct batch *separate, const struct layer *l, enum type type) {
    int64_t *memory = malloc(4 * separate->count * sizeof *memory);
    if (!memory) return 1;
    const struct batch joined = join_rows(separate, memory);
    const int failed = run_tasks(&joined, l, type);
    free(memory);
    return failed;
}

int attend_bfloat16(const struct batch *b, const struct layer *l) { return attend(b, l, BFLOAT16); }

int attend_float32(const struct batch *b, const struct layer *l) { return attend(b, l, FLOAT32); }

/* Copy rows of `bytes` to their slots. */
void store_rows(char *cache, const int64_t *slots, const char *rows, int64_t count, int64_t bytes, int64_t stride) {
#pragma omp parallel for schedule(static) if (count * bytes > STORE_A_THREAD)
    for (int64_t i = 0; i < count; i++) memcpy(cache + slots[i] * bytes, rows + i * stride, bytes);
}

STATUS_CALL(attend_bfloat16, ADDRESS(0), ADDRESS(1))
STATUS_CALL(attend_float32, ADDRESS(0), ADDRESS(1))
CALL(store_rows, ADDRESS(0), ADDRESS(1), ADDRESS(2), NUMBER(3), NUMBER(4), NUMBER(5))
