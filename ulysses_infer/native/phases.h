/* Phases of ranks that share memory: each writes its own slot, then reads the slots of the others.
 *
 * A group is one line of counters a member, and a ring of slots a member. Members run the same exchanges in the same
 * order; an exchange is one phase, or more where the message is larger than a slot. The counter of a member says how
 * far it is: 2p - 1 when what it has to say in phase p lies in its slot, 2p when it has read what it needs of the
 * others'. It writes into a slot again only when all are through with the phase that used it last, so nobody waits
 * for a barrier. Who waits spins for a moment, then yields its core, then sleeps on the counter (a futex), looking up
 * from time to time whether the other is still there.
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

enum { LINE = 128, PAGE = 4096, MOST_SLOTS = 64 };
enum { LOOKS_PER_CLOCK = 32, LOOK_UP_NS = 100 * 1000 * 1000 };
/* Why an exchange failed, in the low byte; above it the member waited for. */
enum { OK = 0, LOST = 1, TIMED_OUT = 2, TOO_WIDE = 3, CLOSED = 4 };

typedef struct {
    _Alignas(LINE) atomic_uint counter;
    atomic_uint sleepers; /* who must be woken when the counter moves */
    atomic_int core;      /* where it ran when it last waited */
} member_line;

typedef struct {
    member_line *lines;
    char *slots; /* [size][num_slots][slot_bytes] */
    int64_t slot_bytes;
    int size, me, num_slots, turn;
    uint32_t phase, last_use[MOST_SLOTS];
    int64_t spin_ns, yield_ns, timeout_ns;
    atomic_uint **left;  /* a flag a member: it will not come any more */
    int *processes;      /* a pidfd a member */
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
        int lost = is_lost(group, member); /* before the counter: it may have come and then left */
        uint32_t seen = atomic_load(&line->counter);
        if ((int32_t)(seen - wanted) >= 0) break;
        int64_t remaining = deadline - now_ns();
        if (lost || remaining <= 0) {
            status = (lost ? LOST : TIMED_OUT) | member << 8;
            break;
        }
        sleep_on(line, seen, remaining < LOOK_UP_NS ? remaining : LOOK_UP_NS);
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
    /* One that shares this core cannot come while this one looks; and who sleeps is woken on a core that is free. */
    while (waited < group->spin_ns + group->yield_ns) {
        if (atomic_load_explicit(&line->core, memory_order_relaxed) == core) break;
        if (waited >= group->spin_ns) sched_yield();
        for (int look = 0; look < LOOKS_PER_CLOCK; look++) {
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
    return group->slots + ((int64_t)member * group->num_slots + group->turn) * group->slot_bytes;
}

/* Take the next phase and the next slot. */
static void enter(group_state *group) {
    group->phase++;
    group->turn = (group->turn + 1) % group->num_slots;
}

/* Wait until nobody reads any more what this rank's slot held. */
static int claim(group_state *group) {
    uint32_t last = group->last_use[group->turn];
    group->last_use[group->turn] = group->phase;
    for (int member = 0; member < group->size; member++)
        if (member != group->me) TRY(await(group, member, 2 * last));
    return OK;
}

static void post(group_state *group) { advance(group, 2 * group->phase - 1); }

static int await_post(group_state *group, int member) { return await(group, member, 2 * group->phase - 1); }

static void finish(group_state *group) { advance(group, 2 * group->phase); }
