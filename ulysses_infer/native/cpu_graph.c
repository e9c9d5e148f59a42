/* CPU graphs: replays the native calls of a recorded step without Python. */
#include <stdint.h>
#include <time.h>

struct call {
    int (*function)(const int64_t *arguments);
    int64_t first; /* index of its first argument */
    int64_t kind;  /* of work, for the timers */
};

static int64_t now_ns(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec * 1000000000LL + time.tv_nsec;
}

/* Make `count` calls and add the time of each to `nanoseconds` of its kind. Stops at the first error. Returns the number
 * of calls that succeeded; `*status` is the status of the last call. */
int64_t cpu_graph_run(const struct call *calls, int64_t count, const int64_t *arguments, int64_t *nanoseconds,
                      int *status) {
    int64_t started = now_ns();
    for (int64_t i = 0; i < count; i++) {
        *status = calls[i].function(arguments + calls[i].first);
        if (*status) return i;
        int64_t ended = now_ns();
        nanoseconds[calls[i].kind] += ended - started;
        started = ended;
    }
    return count;
}
