/* Replays the native calls of a recorded step without Python between them. */
#include <stdint.h>
#include <time.h>

struct call {
    int (*function)(const int64_t *words);
    int64_t first; /* of its words */
    int64_t kind;  /* of work, for the clock */
};

static int64_t now_ns(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec * 1000000000LL + time.tv_nsec;
}

/* Make `count` calls, adding up the nanoseconds of each kind. Returns how many succeeded; the status of the one that
 * did not is put into `*status`. */
int64_t cpu_graph_run(const struct call *calls, int64_t count, const int64_t *words, int64_t *nanoseconds, int *status) {
    int64_t started = now_ns();
    for (int64_t i = 0; i < count; i++) {
        *status = calls[i].function(words + calls[i].first);
        if (*status) return i;
        int64_t ended = now_ns();
        nanoseconds[calls[i].kind] += ended - started;
        started = ended;
    }
    return count;
}
