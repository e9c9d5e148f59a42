/* The functions that clang's parallel loops call, on top of GNU OpenMP's.
 *
 * clang compiles `#pragma omp` for LLVM's runtime, gcc for GNU's. torch's builds bring GNU's, and LLVM's would start
 * threads of its own beside it; it has GNU's functions too. So this file, linked to each library that clang compiles,
 * lets torch's threads run the loops, whichever compiler made torch.
 */
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>

/* -- GNU OpenMP ---------------------------------------------------------------------------------------------- */

void GOMP_parallel(void (*body)(void *), void *data, unsigned threads, unsigned flags);
void GOMP_barrier(void);
void GOMP_critical_start(void);
void GOMP_critical_end(void);
bool GOMP_loop_dynamic_start(long start, long end, long step, long chunk, long *from, long *to);
bool GOMP_loop_dynamic_next(long *from, long *to);
void GOMP_loop_end_nowait(void);
int omp_get_thread_num(void);
int omp_get_num_threads(void);

/* No other library shall find the functions below, such as one with LLVM's runtime. */
#pragma GCC visibility push(hidden)

/* -- parallel regions ---------------------------------------------------------------------------------------- */

enum { MOST_SHARED = 24 };

#define SIX(a, i) a[i], a[i + 1], a[i + 2], a[i + 3], a[i + 4], a[i + 5]

/* A region is a function of two numbers that it ignores, and of the addresses of what it shares. */
typedef void region(int32_t *thread, int32_t *bound, void *, void *, void *, void *, void *, void *, void *, void *,
                    void *, void *, void *, void *, void *, void *, void *, void *, void *, void *, void *, void *,
                    void *, void *, void *, void *);

struct fork {
    region *region;
    void *shared[MOST_SHARED];
};

static void run_region(void *data) {
    const struct fork *fork = data;
    void *const *shared = fork->shared;
    int32_t thread = omp_get_thread_num(), bound = 0;
    /* The callee ignores arguments beyond its own, on x86-64 and on Arm. */
    fork->region(&thread, &bound, SIX(shared, 0), SIX(shared, 6), SIX(shared, 12), SIX(shared, 18));
}

void __kmpc_fork_call(void *location, int32_t count, region *region, ...) {
    struct fork fork = {.region = region};
    va_list shared;
    if (count > MOST_SHARED) abort();
    va_start(shared, region);
    for (int32_t i = 0; i < count; i++) fork.shared[i] = va_arg(shared, void *);
    va_end(shared);
    GOMP_parallel(run_region, &fork, 0, 0);
}

/* Regions of this thread alone that it is inside of, because their `if` was false. */
static _Thread_local int alone;

void __kmpc_serialized_parallel(void *location, int32_t thread) { alone++; }

void __kmpc_end_serialized_parallel(void *location, int32_t thread) { alone--; }

static int64_t threads(void) { return alone ? 1 : omp_get_num_threads(); }

static int64_t this_thread(void) { return alone ? 0 : omp_get_thread_num(); }

int32_t __kmpc_global_thread_num(void *location) { return (int32_t)this_thread(); }

void __kmpc_barrier(void *location, int32_t thread) {
    if (!alone) GOMP_barrier();
}

/* -- reductions ---------------------------------------------------------------------------------------------- */

/* 1: the caller combines its part with the result, which no other thread does meanwhile. */
int32_t __kmpc_reduce_nowait(void *location, int32_t thread, int32_t count, size_t bytes, void *parts,
                             void (*combine)(void *, void *), void *lock) {
    GOMP_critical_start();
    return 1;
}

void __kmpc_end_reduce_nowait(void *location, int32_t thread, void *lock) { GOMP_critical_end(); }

/* -- loops of static chunks ---------------------------------------------------------------------------------- */

enum { STATIC = 34 };

/* This thread's part of `count` iterations: the first ones get one more where they do not divide. */
static void share(uint64_t count, uint64_t *first, uint64_t *own) {
    const uint64_t all = (uint64_t)threads(), me = (uint64_t)this_thread(), rest = count % all;
    *own = count / all + (me < rest);
    *first = me * (count / all) + (me < rest ? me : rest);
}

/* From `lower` to `upper`, which is included: changed to this thread's part, which may be empty. */
#define DEFINE_STATIC(name, type, step_type)                                                                      \
    void __kmpc_for_static_init_##name(void *location, int32_t thread, int32_t schedule, int32_t *last,           \
                                       type *lower, type *upper, step_type *stride, step_type step,               \
                                       step_type chunk) {                                                         \
        const bool rises = step > 0;                                                                              \
        uint64_t count = 0, first, own;                                                                           \
        if (schedule != STATIC) abort();                                                                          \
        if (rises && *upper >= *lower) count = ((uint64_t)*upper - (uint64_t)*lower) / (uint64_t)step + 1;        \
        if (!rises && *lower >= *upper) count = ((uint64_t)*lower - (uint64_t)*upper) / -(uint64_t)step + 1;      \
        if (!count) return;                                                                                       \
        share(count, &first, &own);                                                                               \
        *last = own && first + own == count;                                                                      \
        *stride = (step_type)((uint64_t)step * count);                                                            \
        *lower = (type)((uint64_t)*lower + first * (uint64_t)step);                                               \
        *upper = (type)((uint64_t)*lower + (own - 1) * (uint64_t)step);                                           \
    }

DEFINE_STATIC(4, int32_t, int32_t)
DEFINE_STATIC(4u, uint32_t, int32_t)
DEFINE_STATIC(8, int64_t, int64_t)
DEFINE_STATIC(8u, uint64_t, int64_t)

void __kmpc_for_static_fini(void *location, int32_t thread) {}

/* -- loops that hand out chunks ------------------------------------------------------------------------------- */

static _Thread_local struct {
    long start, end, chunk;
    bool has_begun;
} loop;

static void begin(long start, long end, long chunk) {
    loop.start = start, loop.end = end, loop.chunk = chunk, loop.has_begun = false;
}

static bool next_chunk(long *from, long *to) {
    const bool is_first = !loop.has_begun;
    loop.has_begun = true;
    if (alone) {
        *from = loop.start, *to = loop.end;
        return is_first;
    }
    if (is_first ? GOMP_loop_dynamic_start(loop.start, loop.end, 1, loop.chunk, from, to)
                 : GOMP_loop_dynamic_next(from, to))
        return true;
    GOMP_loop_end_nowait();
    return false;
}

/* From `lower` to `upper`, which is included, like each chunk; clang counts iterations from 0 upwards. */
#define DEFINE_DYNAMIC(name, type, step_type)                                                                     \
    void __kmpc_dispatch_init_##name(void *location, int32_t thread, int32_t schedule, type lower, type upper,    \
                                     step_type step, step_type chunk) {                                           \
        if (step != 1) abort();                                                                                   \
        begin((long)lower, (long)upper + 1, (long)chunk);                                                         \
    }                                                                                                             \
                                                                                                                  \
    int32_t __kmpc_dispatch_next_##name(void *location, int32_t thread, int32_t *last, type *lower, type *upper,  \
                                        step_type *stride) {                                                      \
        long from, to;                                                                                            \
        if (!next_chunk(&from, &to)) return 0;                                                                    \
        *lower = (type)from, *upper = (type)(to - 1), *stride = 1, *last = to == loop.end;                        \
        return 1;                                                                                                 \
    }

DEFINE_DYNAMIC(4, int32_t, int32_t)
DEFINE_DYNAMIC(4u, uint32_t, int32_t)
DEFINE_DYNAMIC(8, int64_t, int64_t)
DEFINE_DYNAMIC(8u, uint64_t, int64_t)

/* clang 20 and newer call it after the loop. */
void __kmpc_dispatch_deinit(void *location, int32_t thread) {}

#pragma GCC visibility pop
