/* Tasks of a parallel region. Each thread has as many, which are neighbours and run in order: it can prefetch what the next
 * one reads. A thread that has none left takes those of another, which the system may have held up.
 */
#pragma once
#include <stdlib.h>

#include "vector.h"

int omp_get_max_threads(void); /* clang has no omp.h of its own */
int omp_get_num_threads(void);
int omp_get_thread_num(void);

#define COUNTER (LINE / (int)sizeof(int64_t)) /* from one thread's number to the next: each has a cache line */

/* Memory for `take_task`, or null. */
INLINE int64_t *task_counters(void) { return aligned_alloc(LINE, omp_get_max_threads() * LINE); }

/* In a parallel region, before a barrier that precedes the first task: this thread's share of `count` tasks. */
INLINE void share_tasks(int64_t *counters, int64_t count) {
    const int64_t thread = omp_get_thread_num();
    counters[thread * COUNTER] = count * thread / omp_get_num_threads();
}

/* The next task for this thread, or -1 if all have been taken. */
INLINE int64_t take_task(int64_t *counters, int64_t count) {
    const int64_t threads = omp_get_num_threads(), own = omp_get_thread_num();
    for (int64_t i = 0; i < threads; i++) {
        const int64_t owner = (own + i) % threads, stop = count * (owner + 1) / threads;
        int64_t *counter = &counters[owner * COUNTER];
        if (__atomic_load_n(counter, __ATOMIC_RELAXED) >= stop) continue;
        const int64_t task = __atomic_fetch_add(counter, 1, __ATOMIC_RELAXED);
        if (task < stop) return task;
    }
    return -1;
}
