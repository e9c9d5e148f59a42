/* Collectives over shared memory: all-reduce, all-to-all, gather, and messages from rank 0.
 *
 * Each takes as many phases (phases.h) as its message needs slots. A member is a rank's index in its process group.
 */
#define _GNU_SOURCE
/* All ranks must round in the same way: sums are in group order in every loop. */
#if defined(__clang__)
#pragma clang fp reassociate(off)
#elif defined(__GNUC__)
#pragma GCC optimize("no-associative-math")
#endif
#include "call.h"
#include "phases.h"

enum { DIRECT_BYTES = 32 * 1024, CHUNK_BYTES = 256 * 1024, BLOCK = 512 };

static int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

static int64_t within(int64_t count, int64_t first, int64_t most) {
    return count <= first ? 0 : least(count - first, most);
}

/* -- sums --------------------------------------------------------------------------------------------------- */

#if defined(__FLT16_MAX__)
typedef _Float16 half;
static inline float half_to_float(half value) { return value; }
static inline half float_to_half(float value) { return (half)value; }
#elif defined(__F16C__)
#include <immintrin.h>
typedef uint16_t half;
static inline float half_to_float(half value) { return _cvtsh_ss(value); }
static inline half float_to_half(float value) { return _cvtss_sh(value, 0); }
#else /* clang before 15, for CPUs without F16C */
#include "vector.h"
typedef float16 half;
static inline float half_to_float(half value) { return float_of_half(value); }
static inline half float_to_half(float value) { return half_of(value); }
#endif

typedef uint16_t brain;
static inline float brain_to_float(brain value) {
    union { uint32_t bits; float value; } wide = {.bits = (uint32_t)value << 16};
    return wide.value;
}
static inline brain float_to_brain(float value) {
    union { float value; uint32_t bits; } wide = {.value = value};
    uint32_t rounded = (wide.bits + 0x7fff + ((wide.bits >> 16) & 1)) >> 16;
    return (wide.bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : (brain)rounded;
}
static inline float same_float(float value) { return value; }
static inline double same_double(double value) { return value; }

/* target = the sum of `count` numbers of each source, in the order of the sources; target may be one of them. */
#define DEFINE_SUM(name, type, wide, widen, narrow)                                                         \
    static void name(void *target, const void **sources, int num_sources, int64_t count) {                  \
        wide sum[BLOCK];                                                                                    \
        for (int64_t first = 0; first < count; first += BLOCK) {                                            \
            int64_t number = least(BLOCK, count - first);                                                   \
            const type *source = (const type *)sources[0] + first;                                          \
            for (int64_t i = 0; i < number; i++) sum[i] = widen(source[i]);                                 \
            for (int other = 1; other < num_sources; other++) {                                             \
                source = (const type *)sources[other] + first;                                              \
                for (int64_t i = 0; i < number; i++) sum[i] += widen(source[i]);                            \
            }                                                                                               \
            type *result = (type *)target + first;                                                          \
            for (int64_t i = 0; i < number; i++) result[i] = narrow(sum[i]);                                \
        }                                                                                                   \
    }

DEFINE_SUM(sum_brain, brain, float, brain_to_float, float_to_brain)
DEFINE_SUM(sum_half, half, float, half_to_float, float_to_half)
DEFINE_SUM(sum_float, float, float, same_float, same_float)
DEFINE_SUM(sum_double, double, double, same_double, same_double)

static const struct {
    void (*sum)(void *, const void **, int, int64_t);
    int64_t bytes;
} KINDS[] = {{sum_brain, 2}, {sum_half, 2}, {sum_float, 4}, {sum_double, 8}};

/* Every member sums everything: one phase. */
static int sum_directly(group_state *group, char *data, int64_t count, int kind) {
    const void *sources[group->size];
    enter(group);
    TRY(claim(group));
    memcpy(slot_of(group, group->me), data, count * KINDS[kind].bytes);
    post(group);
    for (int member = 0; member < group->size; member++) {
        if (member != group->me) TRY(await_post(group, member));
        sources[member] = member == group->me ? data : slot_of(group, member);
    }
    KINDS[kind].sum(data, sources, group->size, count);
    finish(group);
    return OK;
}

/* Reduce-scatter and all-gather: two phases in the same slots. */
static int sum_in_parts(group_state *group, char *data, int64_t count, int kind) {
    int size = group->size, me = group->me;
    int64_t bytes = KINDS[kind].bytes, starts[size + 1];
    const void *sources[size];
    for (int member = 0; member <= size; member++) starts[member] = count * member / size;
    int64_t mine = starts[me] * bytes, mine_end = starts[me + 1] * bytes;
    enter(group);
    TRY(claim(group));
    char *slot = slot_of(group, me);
    memcpy(slot, data, mine);
    memcpy(slot + mine_end, data + mine_end, count * bytes - mine_end);
    post(group);
    for (int member = 0; member < size; member++) {
        if (member != me) TRY(await_post(group, member));
        sources[member] = (member == me ? data : slot_of(group, member)) + mine;
    }
    KINDS[kind].sum(data + mine, sources, size, starts[me + 1] - starts[me]);
    memcpy(slot + mine, data + mine, mine_end - mine);
    group->phase++;
    group->last_use[group->slot] = group->phase;
    post(group);
    for (int step = 1; step < size; step++) {
        int member = (me + step) % size;
        int64_t start = starts[member] * bytes;
        TRY(await_post(group, member));
        memcpy(data + start, slot_of(group, member) + start, starts[member + 1] * bytes - start);
    }
    finish(group);
    return OK;
}

/* All-reduce of `count` numbers in place. */
int group_sum(group_state *group, char *data, int64_t count, int kind) {
    if (!group) return CLOSED;
    int64_t bytes = KINDS[kind].bytes;
    if (count * bytes <= DIRECT_BYTES) return sum_directly(group, data, count, kind);
    int64_t most = least(CHUNK_BYTES, group->slot_bytes) / bytes;
    for (int64_t first = 0; first < count; first += most)
        TRY(sum_in_parts(group, data + first * bytes, least(most, count - first), kind));
    return OK;
}

/* -- all-to-alls -------------------------------------------------------------------------------------------- */

typedef struct {
    const char *source; /* [own tokens, heads of all members, head_bytes], heads and tokens strided */
    char *target;       /* [tokens of all members, own heads, head_bytes], dense */
    int64_t heads;      /* of one member */
    int64_t head_bytes, token_stride, head_stride;
} piece;

/* Copy `count` of this member's tokens from `first` on, with the heads of `member`, densely to `target`. */
static void pack(const piece *from, int member, int64_t first, int64_t count, char *target) {
    int64_t row = from->heads * from->head_bytes;
    const char *source = from->source + first * from->token_stride + member * from->heads * from->head_stride;
    for (int64_t token = 0; token < count; token++, source += from->token_stride, target += row) {
        if (from->head_stride == from->head_bytes) {
            memcpy(target, source, row);
            continue;
        }
        for (int64_t head = 0; head < from->heads; head++)
            memcpy(target + head * from->head_bytes, source + head * from->head_stride, from->head_bytes);
    }
}

/* Rows of `row` bytes per phase; 0 if a slot does not hold one. */
static int64_t rows_at_a_time(const group_state *group, int64_t row) {
    if (row > group->slot_bytes) return 0;
    int64_t rows = least(CHUNK_BYTES, group->slot_bytes) / (row ? row : 1);
    return rows ? rows : 1;
}

static int64_t largest(const group_state *group, const int64_t *starts) {
    int64_t most = 0;
    for (int member = 0; member < group->size; member++)
        if (starts[member + 1] - starts[member] > most) most = starts[member + 1] - starts[member];
    return most;
}

/* All-to-all from own tokens with all heads to all tokens with own heads. Tokens `starts[i]` to `starts[i + 1]` are
 * member i's. A slot holds a block of rows for each member, with its pieces one after another. */
int group_tokens_to_heads(group_state *group, const int64_t *starts, const piece *pieces, int num_pieces) {
    if (!group) return CLOSED;
    int me = group->me;
    int64_t row = 0, most = largest(group, starts), mine = starts[me + 1] - starts[me];
    for (int i = 0; i < num_pieces; i++) row += pieces[i].heads * pieces[i].head_bytes;
    int64_t step = rows_at_a_time(group, row * group->size);
    if (!step) return TOO_WIDE;
    for (int64_t first = 0; first < most; first += step) {
        int64_t count = within(mine, first, step);
        enter(group);
        TRY(claim(group));
        for (int member = 0; member < group->size; member++) {
            char *block = slot_of(group, me) + member * step * row;
            for (int i = 0; i < num_pieces; i++) {
                int64_t bytes = pieces[i].heads * pieces[i].head_bytes;
                int is_own = member == me;
                pack(&pieces[i], member, first, count, is_own ? pieces[i].target + (starts[me] + first) * bytes : block);
                block += count * bytes;
            }
        }
        post(group);
        for (int next = 1; next < group->size; next++) {
            int member = (me + next) % group->size;
            TRY(await_post(group, member));
            int64_t theirs = within(starts[member + 1] - starts[member], first, step);
            const char *block = slot_of(group, member) + me * step * row;
            for (int i = 0; i < num_pieces; i++) {
                int64_t bytes = pieces[i].heads * pieces[i].head_bytes;
                memcpy(pieces[i].target + (starts[member] + first) * bytes, block, theirs * bytes);
                block += theirs * bytes;
            }
        }
        finish(group);
    }
    return OK;
}

static void spread(const char *source, char *target, int64_t rows, int64_t row, int64_t stride) {
    for (int64_t i = 0; i < rows; i++) memcpy(target + i * stride, source + i * row, row);
}

/* All-to-all from all tokens with own heads to own tokens with all heads.
 * source: [tokens of all members, row bytes]; target: [own tokens, size * row bytes], both dense. */
int group_heads_to_tokens(group_state *group, const int64_t *starts, const char *source, char *target, int64_t row) {
    if (!group) return CLOSED;
    int me = group->me;
    int64_t most = largest(group, starts), mine = starts[me + 1] - starts[me], wide = row * group->size;
    int64_t step = rows_at_a_time(group, wide);
    if (!step) return TOO_WIDE;
    for (int64_t first = 0; first < most; first += step) {
        int64_t count = within(mine, first, step);
        enter(group);
        TRY(claim(group));
        for (int member = 0; member < group->size; member++) {
            if (member == me) continue;
            int64_t theirs = within(starts[member + 1] - starts[member], first, step);
            memcpy(slot_of(group, me) + member * step * row, source + (starts[member] + first) * row, theirs * row);
        }
        post(group);
        char *rows = target + first * wide;
        spread(source + (starts[me] + first) * row, rows + me * row, count, row, wide);
        for (int next = 1; next < group->size; next++) {
            int member = (me + next) % group->size;
            TRY(await_post(group, member));
            spread(slot_of(group, member) + me * step * row, rows + member * row, count, row, wide);
        }
        finish(group);
    }
    return OK;
}

/* All-gather: bytes `starts[i]` to `starts[i + 1]` of `target` come from member i; own data is at `source`. */
int group_gather(group_state *group, const int64_t *starts, const char *source, char *target) {
    if (!group) return CLOSED;
    int me = group->me;
    int64_t most = largest(group, starts), mine = starts[me + 1] - starts[me];
    int64_t step = least(CHUNK_BYTES, group->slot_bytes);
    for (int64_t first = 0; first < most; first += step) {
        enter(group);
        TRY(claim(group));
        memcpy(slot_of(group, me), source + first, within(mine, first, step));
        post(group);
        for (int next = 1; next < group->size; next++) {
            int member = (me + next) % group->size;
            TRY(await_post(group, member));
            int64_t theirs = within(starts[member + 1] - starts[member], first, step);
            memcpy(target + starts[member] + first, slot_of(group, member), theirs);
        }
        finish(group);
    }
    memcpy(target + starts[me], source, mine);
    return OK;
}

/* Gather `bytes` of every member at `target` of member 0; the others do not wait for each other. */
int group_gather_to_first(group_state *group, const char *source, char *target, int64_t bytes) {
    if (!group) return CLOSED;
    int64_t step = least(CHUNK_BYTES, group->slot_bytes);
    for (int64_t first = 0; first < bytes; first += step) {
        int64_t count = least(step, bytes - first);
        enter(group);
        if (group->me) {
            TRY(claim(group));
            memcpy(slot_of(group, group->me), source + first, count);
            post(group);
        } else {
            group->last_use[group->slot] = group->phase;
            for (int member = 1; member < group->size; member++) {
                TRY(await_post(group, member));
                memcpy(target + member * bytes + first, slot_of(group, member), count);
            }
        }
        finish(group);
    }
    if (!group->me) memcpy(target, source, bytes);
    return OK;
}

/* -- messages of member 0 ----------------------------------------------------------------------------------- */

/* Member 0: send a message to the others, in as many slots as it needs; the first begins with its length. */
int group_send(group_state *group, const char *message, int64_t length) {
    if (!group) return CLOSED;
    int64_t head = sizeof(length);
    for (int64_t first = 0; first < length || head; head = 0) {
        int64_t count = least(length - first, group->slot_bytes - head);
        enter(group);
        TRY(claim(group));
        memcpy(slot_of(group, 0), &length, head);
        memcpy(slot_of(group, 0) + head, message + first, count);
        finish(group);
        first += count;
    }
    return OK;
}

/* The others: wait for the next message. If `*length` is more than `capacity`, call again with more room. */
int group_receive(group_state *group, char *buffer, int64_t capacity, int64_t *length) {
    if (!group) return CLOSED;
    int64_t head = sizeof(*length);
    for (int64_t first = 0; head || first < *length; head = 0) {
        TRY(await(group, 0, 2 * (group->phase + 1)));
        int first_slot = group->slot;
        enter(group);
        const char *slot = slot_of(group, 0);
        memcpy(length, slot, head);
        if (*length > capacity) {
            group->phase--;
            group->slot = first_slot;
            return OK;
        }
        int64_t count = least(*length - first, group->slot_bytes - head);
        memcpy(buffer + first, slot + head, count);
        finish(group);
        first += count;
    }
    return OK;
}

/* -- memory and groups -------------------------------------------------------------------------------------- */

/* Map the file; NULL on error. */
void *memory_map(int file, int64_t bytes) {
    void *base = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    return base == MAP_FAILED ? NULL : base;
}

void memory_unmap(void *base, int64_t bytes) { munmap(base, bytes); }

/* Bytes that a process group needs, in whole pages. */
int64_t group_bytes(int size, int num_slots, int64_t slot_bytes) {
    return (size * ((int64_t)sizeof(member_line) + num_slots * slot_bytes) + PAGE - 1) / PAGE * PAGE;
}

/* Open the process group at `place`, in zeroed memory. `left`: the members' flags; `processes`: their pidfds. Returns
 * NULL if out of memory. */
group_state *group_open(char *place, int size, int me, int num_slots, int64_t slot_bytes, char **left,
                        const int *processes, int64_t spin_ns, int64_t yield_ns) {
    if (num_slots > MOST_SLOTS) return NULL;
    group_state *group = calloc(1, sizeof(*group) + size * (sizeof(*group->left) + sizeof(*group->processes)));
    if (!group) return NULL;
    group->slots = place;
    group->lines = (member_line *)(place + (int64_t)size * num_slots * slot_bytes);
    group->size = size, group->me = me;
    group->num_slots = num_slots, group->slot_bytes = slot_bytes;
    group->spin_ns = spin_ns, group->yield_ns = yield_ns, group->timeout_ns = INT64_MAX / 2;
    group->left = (atomic_uint **)(group + 1);
    group->processes = (int *)(group->left + size);
    memcpy(group->left, left, size * sizeof(*group->left));
    memcpy(group->processes, processes, size * sizeof(*group->processes));
    return group;
}

void group_limit(group_state *group, int64_t timeout_ns) { group->timeout_ns = timeout_ns; }

/* How long a waiting rank spins, and then yields, before it sleeps. */
void group_patience(group_state *group, int64_t spin_ns, int64_t yield_ns) {
    group->spin_ns = spin_ns, group->yield_ns = yield_ns;
}

/* Leave: ranks that wait for this one stop waiting, at once if they wait in this process group. */
void group_close(group_state *group) {
    atomic_store(group->left[group->me], 1);
    syscall(SYS_futex, &group->lines[group->me].counter, FUTEX_WAKE, INT_MAX, NULL, NULL, 0);
    free(group);
}

STATUS_CALL(group_sum, ADDRESS(0), ADDRESS(1), NUMBER(2), NUMBER(3))
STATUS_CALL(group_tokens_to_heads, ADDRESS(0), ADDRESS(1), ADDRESS(2), NUMBER(3))
STATUS_CALL(group_heads_to_tokens, ADDRESS(0), ADDRESS(1), ADDRESS(2), ADDRESS(3), NUMBER(4))
STATUS_CALL(group_gather, ADDRESS(0), ADDRESS(1), ADDRESS(2), ADDRESS(3))
STATUS_CALL(group_gather_to_first, ADDRESS(0), ADDRESS(1), ADDRESS(2), NUMBER(3))
