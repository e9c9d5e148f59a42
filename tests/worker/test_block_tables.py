"""Block tables updated from plans equal those computed from scratch, for any traffic."""

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ulysses_infer.attention.span import AttentionSpan
from ulysses_infer.cache.pools import BlockPools
from ulysses_infer.parallel.layout import Mode
from ulysses_infer.worker.block_tables import BlockTables
from ulysses_infer.worker.step_plan import DRAFT_LOGITS, LAST_LOGITS, PlanItem, StepPlan

BLOCK_SIZE, MAX_SEQUENCES, MAX_BLOCKS = 4, 5, 8


def plan_of(items, dropped=()):
    tokens = np.zeros(sum(item.num_tokens for item in items), dtype=np.int32)
    return StepPlan(0, Mode(1, 1), list(items), tokens, list(dropped), False)


def from_scratch(parts):
    """Positions, slots and lengths of (block table, start, count) parts, token by token."""
    positions, slots, query_lens, context_lens = [], [], [], []
    for table, start, count in parts:
        for position in range(start, start + count):
            positions.append(position)
            slots.append(table[position // BLOCK_SIZE] * BLOCK_SIZE + position % BLOCK_SIZE)
        query_lens.append(count)
        context_lens.append(start + count)
    return positions, slots, query_lens, context_lens


class Simulation:
    """Sequences that are admitted, grow, are preempted, come back and end, with their true block tables."""

    def __init__(self, random):
        self.random, self.tables = random, BlockTables(BLOCK_SIZE, MAX_SEQUENCES, MAX_BLOCKS)
        self.running, self.preempted = {}, []  # handle -> [table, tokens computed]
        self.next_handle, self.dropped = 0, []

    def admit(self):
        if self.preempted and self.random.random() < 0.5:
            handle = self.preempted.pop()
        else:
            handle, self.next_handle = self.next_handle, self.next_handle + 1
        self.running[handle] = [[], 0]

    def end(self, handle, preempt):
        del self.running[handle]
        self.dropped.append(handle)
        if preempt:
            self.preempted.append(handle)

    def step(self):
        for handle in [h for h in self.running if self.random.random() < 0.2]:
            self.end(handle, preempt=self.random.random() < 0.5)
        while len(self.running) < MAX_SEQUENCES and self.random.random() < 0.6:
            self.admit()
        items, parts = [], []
        for handle, state in self.running.items():
            table, start = state
            count = self.random.randint(1, 6)
            if start + count > MAX_BLOCKS * BLOCK_SIZE or self.random.random() < 0.2:
                continue  # full, or left out of this step
            needed = -(-(start + count) // BLOCK_SIZE)
            new = [self.random.randrange(1000) for _ in range(needed - len(table))]
            table += new
            state[1] = start + count
            items.append(PlanItem(handle, start, count, new, LAST_LOGITS))
            parts.append((list(table), start, count))
        if not items:
            return None
        plan, self.dropped = plan_of(items, self.dropped), []
        return plan, parts


@settings(max_examples=60, deadline=None)
@given(st.randoms(use_true_random=False), st.integers(1, 40))
def test_updated_tables_equal_those_from_scratch(random, steps):
    simulation = Simulation(random)
    for _ in range(steps):
        made = simulation.step()
        if made is None:
            continue
        plan, parts = made
        arrays = simulation.tables.apply(plan)
        positions, slots, query_lens, context_lens = from_scratch(parts)
        assert arrays.positions.tolist() == positions
        assert arrays.groups[0].slots.tolist() == slots
        assert (arrays.query_lens, arrays.groups[0].context_lens) == (query_lens, context_lens)
        assert arrays.groups[0].block_tables.shape == (len(parts), max(-(-c // BLOCK_SIZE) for c in context_lens))
        for row, (table, start, count) in zip(arrays.groups[0].block_tables, parts, strict=True):
            used = -(-(start + count) // BLOCK_SIZE)
            assert row[:used].tolist() == table[:used]
        assert len(simulation.tables) <= MAX_SEQUENCES


def test_a_prefix_from_the_cache_is_a_start_beyond_the_first_token():
    tables = BlockTables(BLOCK_SIZE, 2, MAX_BLOCKS)
    arrays = tables.apply(plan_of([PlanItem(3, 8, 2, [5, 6, 7], LAST_LOGITS)]))
    assert arrays.positions.tolist() == [8, 9]
    assert arrays.groups[0].slots.tolist() == [28, 29]
    assert arrays.groups[0].block_tables.tolist() == [[5, 6, 7]]


def test_decodes_with_drafts_are_sequences_of_one_token():
    tables = BlockTables(BLOCK_SIZE, 2, MAX_BLOCKS)
    tables.apply(plan_of([PlanItem(3, 0, 6, [5, 6], LAST_LOGITS), PlanItem(4, 0, 2, [7], LAST_LOGITS)]))
    arrays = tables.apply(plan_of([PlanItem(3, 6, 3, [9], DRAFT_LOGITS), PlanItem(4, 2, 1, [], LAST_LOGITS)]))
    assert arrays.query_lens == [1, 1, 1, 1]
    assert arrays.positions.tolist() == [6, 7, 8, 2]
    assert arrays.groups[0].context_lens == [7, 8, 9, 3]
    assert arrays.groups[0].slots.tolist() == [26, 27, 36, 30]
    assert [row[0] for row in arrays.groups[0].block_tables.tolist()] == [5, 5, 5, 7]
    rejected = tables.apply(plan_of([PlanItem(3, 7, 1, [], LAST_LOGITS)]))
    assert rejected.groups[0].slots.tolist() == [27], "the slot of a rejected token is written again"


def test_a_preempted_sequence_starts_again():
    tables = BlockTables(BLOCK_SIZE, 1, MAX_BLOCKS)
    tables.apply(plan_of([PlanItem(3, 0, 6, [5, 6], LAST_LOGITS)]))
    arrays = tables.apply(plan_of([PlanItem(3, 0, 6, [1, 2], LAST_LOGITS)], dropped=[3]))
    assert arrays.groups[0].block_tables.tolist() == [[1, 2]]
    assert len(tables) == 1


def test_a_row_is_free_again_once_its_sequence_is_dropped():
    tables = BlockTables(BLOCK_SIZE, 1, MAX_BLOCKS)
    for handle in range(5):
        tables.apply(plan_of([PlanItem(handle, 0, 1, [handle], LAST_LOGITS)], dropped=[handle - 1, 99]))
        assert len(tables) == 1
    with pytest.raises(IndexError):
        tables.apply(plan_of([PlanItem(7, 0, 1, [7], LAST_LOGITS)]))


limits = st.builds(AttentionSpan, st.none() | st.integers(1, 20), st.none() | st.integers(1, 12))


@settings(max_examples=80, deadline=None)
@given(st.lists(limits, min_size=1, max_size=3), st.lists(st.integers(1, 9), min_size=1, max_size=6), st.integers(0, 4))
def test_tables_of_every_group_show_what_its_layers_see_and_no_more_than_that(attention_spans, counts, cached):
    """Two sequences over groups that give blocks back: one computed from the start, one after a cached prefix."""
    pools = BlockPools([60] * len(attention_spans), BLOCK_SIZE, attention_spans=attention_spans)
    tables = BlockTables(BLOCK_SIZE, 2, 20, attention_spans)
    starts, held, ends = [0, cached * BLOCK_SIZE], [[[] for _ in attention_spans] for _ in range(2)], [0, cached]
    for group, attention_span in enumerate(attention_spans):  # as a prefix hit of that many blocks would share them
        count = cached - attention_span.first_visible(starts[1]) // BLOCK_SIZE
        held[1][group] = pools.pools[group].allocate(count)
    truth = [[{} for _ in attention_spans] for _ in range(2)]
    for turn, count in enumerate(counts):
        items, parts = [], list(enumerate(starts))[:: 1 if turn % 2 else -1]
        for index, start in parts:
            pools.free_out_of_window_blocks(held[index], ends[index], start, 10)
            end = -(-(start + count) // BLOCK_SIZE)
            new = pools.extend(held[index], end - ends[index])
            announced = new if turn else [block for table in held[index] for block in table]
            items.append(PlanItem(index, start, count, announced, LAST_LOGITS))
            starts[index], ends[index] = start + count, end
            for known, table in zip(truth[index], held[index], strict=True):
                known.update(zip(range(end - len(table), end), table, strict=True))
        arrays = tables.apply(plan_of(items))
        for (group, attention_span), (row, (index, start)) in product(enumerate(attention_spans), enumerate(parts)):
            check_seen(arrays.groups[group], row, truth[index][group], attention_span, start, count)


def check_seen(seen, row, blocks, attention_span, start, count):
    """The row of a sequence with tokens `start` to `start + count` in the step; `blocks`: its true ones by number."""
    offset = start + count - seen.context_lens[row]
    assert offset % BLOCK_SIZE == 0
    assert offset <= attention_span.first_visible(start)
    slots = seen.slots[row * count : (row + 1) * count].tolist()
    for position, slot in zip(range(start, start + count), slots, strict=True):
        assert slot == blocks[position // BLOCK_SIZE] * BLOCK_SIZE + position % BLOCK_SIZE
        first = attention_span.first_visible(position)
        assert attention_span.first_visible(position - offset) == first - offset, "windows and chunks have not moved"
        for other in range(first, position + 1):
            assert seen.block_tables[row, (other - offset) // BLOCK_SIZE] == blocks[other // BLOCK_SIZE]


def test_tables_of_a_window_are_as_wide_as_the_window():
    tables = BlockTables(BLOCK_SIZE, 2, 100, (AttentionSpan(), AttentionSpan(6)))
    tables.apply(plan_of([PlanItem(3, 0, 100, [*range(25), *range(50, 75)], LAST_LOGITS)]))
    whole, window = tables.apply(plan_of([PlanItem(3, 100, 1, [25, 75], LAST_LOGITS)])).groups
    assert (whole.block_tables.tolist(), whole.context_lens) == ([[*range(26)]], [101])
    assert (window.block_tables.tolist(), window.context_lens) == ([[73, 74, 75]], [9])
    assert (whole.slots.tolist(), window.slots.tolist()) == ([100], [300])
