/* Tasks of a parallel region. Each thread gets an equal share of neighbouring tasks and runs them in order, so it can
 * prefetch what the next one reads. A thread that has none left takes those of another, which the system may have held up.
 */
#pragma once
#include "vector.h"

int omp_get_max_threads(void); /* clang has no omp.h of its own */
int omp_get_thread_num(void);

#define MOST_THREADS 256

/* The tasks of a thread that are left; each has a cache line. */
struct range {
    int64_t next, stop;
} __attribute__((aligned(LINE)));

struct tasks {
    struct range *of; /* [threads] */
    int64_t count, threads;
};

/* Give each thread its tasks, before any is taken. */
INLINE void share(const struct tasks *t) {
    for (int64_t i = 0; i < t->threads; i++)
        t->of[i].next = t->count * i / t->threads, t->of[i].stop = t->count * (i + 1) / t->threads;
}

/* All threads, or the calling one. */
INLINE int64_t threads_for(int is_parallel) {
    const int64_t threads = is_parallel ? omp_get_max_threads() : 1;
    return threads < MOST_THREADS ? threads : MOST_THREADS;
}

/* `count` tasks for `threads` threads. They end before the calling thread asks for others. */
INLINE struct tasks tasks_of(int64_t count, int64_t threads) {
    static _Thread_local struct range ranges[MOST_THREADS];
    const struct tasks t = {ranges, count, threads};
    share(&t);
    return t;
}

/* The next task for this thread, or -1 if all have been taken. */
INLINE int64_t take_task(const struct tasks *t) {
    int64_t owner = omp_get_thread_num();
    for (int64_t i = 0; i < t->threads; i++, owner++) {
        if (owner >= t->threads) owner = 0;
        struct range *range = &t->of[owner];
        if (__atomic_load_n(&range->next, __ATOMIC_RELAXED) >= range->stop) continue;
        const int64_t task = __atomic_fetch_add(&range->next, 1, __ATOMIC_RELAXED);
        if (task < range->stop) return task;
    }
    return -1;
}
