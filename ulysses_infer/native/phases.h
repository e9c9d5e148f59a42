/* Phases of ranks that share memory: in each, a rank writes its own slot, then reads the slots of the others.
 *
 * A process group has one line of counters and one ring of slots per rank. All ranks run the same collectives in the
 * same order. A collective takes one phase, or more if the message is larger than a slot. A rank's counter shows its
 * progress: 2p - 1 when its data of phase p is in its slot, 2p when it has read what it needs from the others. A slot
 * is written again only when all ranks have finished the phase that used it last, so no barrier is needed. A waiting
 * rank spins briefly, then yields its core, then sleeps on the counter (a futex) and checks now and then whether the
 * other rank is still alive.
 */
#pragma once
#include <errno.h>
#include <limits.h>
#include <linux/futex.h>
#include <poll.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

enum { TWO_LINES = 128, PAGE = 4096, MOST_SLOTS = 64 };
enum { SPINS_PER_CLOCK = 32, ALIVE_CHECK_NS = 100 * 1000 * 1000 };
/* Status of a collective, in the low byte; the higher bytes hold the rank that was waited for. */
enum { OK = 0, LOST = 1, TIMED_OUT = 2, TOO_WIDE = 3, CLOSED = 4 };

typedef struct {
    _Alignas(TWO_LINES) atomic_uint counter;
    atomic_uint sleepers; /* number of ranks to wake when the counter changes */
    atomic_int core;      /* the rank's core when it last waited */
} member_line;

typedef struct {
    member_line *lines;
    char *slots; /* [size][num_slots][slot_bytes] */
    int64_t slot_bytes;
    int size, me, num_slots, slot;
    uint32_t phase, last_use[MOST_SLOTS];
    int64_t spin_ns, yield_ns, timeout_ns;
    atomic_uint **left;  /* per rank: whether it has left */
    int *processes;      /* pidfd per rank */
} group_state;

#define TRY(call)                     \
    do {                              \
        int status_ = (call);         \
        if (status_) return status_;  \
    } while (0)

/* -- waiting ------------------------------------------------------------------------------------------------ */

static int64_t now_ns(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec * 1000000000LL + time.tv_nsec;
}

static void relax(void) {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ __volatile__("isb" ::: "memory");
#endif
}

static int has_reached(member_line *line, uint32_t wanted) {
    return (int32_t)(atomic_load_explicit(&line->counter, memory_order_acquire) - wanted) >= 0;
}

static int is_lost(group_state *group, int member) {
    if (atomic_load(group->left[member])) return 1;
    struct pollfd process = {.fd = group->processes[member], .events = POLLIN};
    return poll(&process, 1, 0) > 0;
}

static void sleep_on(member_line *line, uint32_t seen, int64_t most_ns) {
    struct timespec time = {.tv_sec = most_ns / 1000000000, .tv_nsec = most_ns % 1000000000};
    syscall(SYS_futex, &line->counter, FUTEX_WAIT, seen, &time, NULL, 0);
}

static int await_asleep(group_state *group, int member, uint32_t wanted, int64_t deadline) {
    member_line *line = &group->lines[member];
    int status = OK;
    atomic_fetch_add(&line->sleepers, 1);
    for (;;) {
        int lost = is_lost(group, member); /* checked before the counter: the rank may have advanced and then left */
        uint32_t seen = atomic_load(&line->counter);
        if ((int32_t)(seen - wanted) >= 0) break;
        int64_t remaining = deadline - now_ns();
        if (lost || remaining <= 0) {
            status = (lost ? LOST : TIMED_OUT) | member << 8;
            break;
        }
        sleep_on(line, seen, remaining < ALIVE_CHECK_NS ? remaining : ALIVE_CHECK_NS);
    }
    atomic_fetch_sub(&line->sleepers, 1);
    return status;
}

static int await(group_state *group, int member, uint32_t wanted) {
    member_line *line = &group->lines[member];
    if (has_reached(line, wanted)) return OK;
    int core = sched_getcpu();
    atomic_store_explicit(&group->lines[group->me].core, core, memory_order_relaxed);
    int64_t started = now_ns(), waited = 0;
    /* A rank on the same core cannot advance while this one spins; a sleeping one is woken on a free core. */
    while (waited < group->spin_ns + group->yield_ns) {
        if (atomic_load_explicit(&line->core, memory_order_relaxed) == core) break;
        if (waited >= group->spin_ns) sched_yield();
        for (int spin = 0; spin < SPINS_PER_CLOCK; spin++) {
            if (has_reached(line, wanted)) return OK;
            relax();
        }
        waited = now_ns() - started;
    }
    return await_asleep(group, member, wanted, started + group->timeout_ns);
}

static void advance(group_state *group, uint32_t counter) {
    member_line *mine = &group->lines[group->me];
    atomic_store(&mine->counter, counter);
    if (atomic_load(&mine->sleepers)) syscall(SYS_futex, &mine->counter, FUTEX_WAKE, INT_MAX, NULL, NULL, 0);
}

/* -- phases ------------------------------------------------------------------------------------------------- */

static char *slot_of(group_state *group, int member) {
    return group->slots + ((int64_t)member * group->num_slots + group->slot) * group->slot_bytes;
}

/* Begin the next phase, with the next slot. */
static void enter(group_state *group) {
    group->phase++;
    group->slot = (group->slot + 1) % group->num_slots;
}

/* Wait until no rank reads this rank's slot any more. */
static int claim(group_state *group) {
    uint32_t last = group->last_use[group->slot];
    group->last_use[group->slot] = group->phase;
    for (int member = 0; member < group->size; member++)
        if (member != group->me) TRY(await(group, member, 2 * last));
    return OK;
}

static void post(group_state *group) { advance(group, 2 * group->phase - 1); }

static int await_post(group_state *group, int member) { return await(group, member, 2 * group->phase - 1); }

static void finish(group_state *group) { advance(group, 2 * group->phase); }
