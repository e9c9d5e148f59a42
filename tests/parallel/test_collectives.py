"""The exchanges of a step, on real ranks, against what each rank should hold by the layout."""

import pytest
import torch

from ulysses_infer.model.layers.attention import _tokens_to_heads
from ulysses_infer.model.layers.head_plan import HeadPlan
from ulysses_infer.parallel.groups import build_groups
from ulysses_infer.parallel.head_layout import head_layout
from ulysses_infer.parallel.layout import Layout, Mode, token_spans

CPU = torch.device("cpu")
WIDTH = 3
BACKENDS = ("torch", "shared_memory")
CASES = [(2, 1, "sp_inner"), (4, 1, "sp_inner"), (4, 2, "sp_inner"), (4, 2, "tp_inner"), (8, 2, "tp_inner")]


class Context:
    """The part of a step context that the exchange reads."""

    def __init__(self, collectives, spans):
        self.collectives, self.token_spans = collectives, spans


def whole(num_tokens, heads, kind):
    """[T, heads, d] where every value names its token, head, place and kind."""
    token = torch.arange(num_tokens)[:, None, None] * 10_000.0
    head = torch.arange(heads)[None, :, None] * 100.0
    return token + head + torch.arange(WIDTH)[None, None, :] + kind / 2


def exchange_all(backend, world_size, tp, order, query_heads, key_value_heads):
    """On a rank: every mode with sp > 1, T = 1 .. 11: to heads and back. Raises on the first difference."""
    layout = Layout(Mode(world_size // tp, tp), order)
    groups = build_groups(layout, layout.modes, CPU, collectives=backend)
    checked = 0
    for mode in layout.modes:
        place = groups.place(mode)
        heads = head_layout(world_size, query_heads, key_value_heads)
        plan = HeadPlan(heads)
        plan.bind(place)
        for num_tokens in range(1, 12) if mode.sp > 1 else ():
            spans = token_spans(num_tokens, mode.sp)
            context = Context(groups.by_mode[mode], spans)
            mine = slice(*spans[place.token_index])
            held = heads.query_span(place.weight_index, mode.tp)
            shared = heads.key_value_span(place.weight_index, mode.tp)
            sources = [
                whole(num_tokens, query_heads, 0)[mine, slice(*held)],
                whole(num_tokens, key_value_heads, 1)[mine, slice(*shared)],
                whole(num_tokens, key_value_heads, 2)[mine, slice(*shared)],
            ]
            query, key, value = _tokens_to_heads(context, plan, *sources)
            own = plan.of_shard(torch.arange(query_heads))
            own_shared = [slot.key_value_head for slot in heads.shards[place.shard].slots]
            assert torch.equal(query, whole(num_tokens, query_heads, 0)[:, own])
            assert torch.equal(key, whole(num_tokens, key_value_heads, 1)[:, own_shared])
            assert torch.equal(value, whole(num_tokens, key_value_heads, 2)[:, own_shared])
            back = groups.by_mode[mode].heads_to_tokens(query.flatten(1), spans).unflatten(1, (-1, WIDTH))
            expected = sources[0].clone()
            mine = heads.own_query_span(place.weight_index, mode.tp).relative_to(held)
            expected[:, : mine.start], expected[:, mine.stop :] = 0, 0
            assert torch.equal(plan.restored(back), expected), (mode, num_tokens)
            checked += 1
    groups.close()
    return checked


@pytest.mark.distributed
@pytest.mark.parametrize(("world_size", "tp", "order"), CASES)
@pytest.mark.parametrize(
    ("query_heads", "key_value_heads"), [(8, 1), (8, 2), (8, 8), (9, 3), pytest.param(3, 3, marks=pytest.mark.thorough)]
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_tokens_become_heads_and_come_back(rank_pool, backend, world_size, tp, order, query_heads, key_value_heads):
    """Heads that do not divide over the ranks are padded on the way and come back without padding."""
    num_exchanging_modes = len([m for m in Layout(Mode(world_size // tp, tp)).modes if m.sp > 1])
    checked = rank_pool(world_size).run(exchange_all, backend, world_size, tp, order, query_heads, key_value_heads)
    assert checked == [11 * num_exchanging_modes] * world_size


def gather_uneven(backend, world_size, tp):
    layout = Layout(Mode(world_size // tp, tp))
    groups = build_groups(layout, layout.modes, CPU, collectives=backend)
    for mode in layout.modes:
        place = groups.place(mode)
        for total in range(7):
            counts = [span.size for span in token_spans(total, mode.sp)]
            rows = torch.arange(total * WIDTH).view(total, WIDTH).float()
            mine = slice(*token_spans(total, mode.sp)[place.token_index])
            assert torch.equal(groups.by_mode[mode].gather_rows(rows[mine], counts), rows)
    groups.close()


@pytest.mark.distributed
@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_of_all_token_slices_are_gathered_in_batch_order(rank_pool, backend, tp):
    rank_pool(4).run(gather_uneven, backend, 4, tp)


def sum_partials(backend, world_size, tp, order):
    layout = Layout(Mode(world_size // tp, tp), order)
    groups = build_groups(layout, layout.modes, CPU, collectives=backend)
    sums = {}
    for mode, collectives in groups.by_mode.items():
        partial = torch.full((2, 2), 10.0**groups.shard)
        assert collectives.sum_over_tp(partial) is partial
        sums[mode] = int(partial[0, 0])
    shard = groups.shard
    groups.close()
    return shard, sums


@pytest.mark.distributed
@pytest.mark.parametrize("order", ["sp_inner", "tp_inner"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_partial_results_are_summed_over_the_tensor_parallel_group_alone(rank_pool, backend, order):
    layout = Layout(Mode(2, 2), order)
    for shard, sums in rank_pool(4).run(sum_partials, backend, 4, 2, order):
        assert sums[Mode(2, 2)] == 10**shard + 10 ** (shard ^ 2)
        assert sums[layout.shift] == 1111


def gather_shards(backend, tp, order):
    layout = Layout(Mode(4 // tp, tp), order)
    groups = build_groups(layout, layout.modes, CPU, collectives=backend)
    gathered = groups.gather_to_first(torch.tensor([[float(groups.shard)]]))
    groups.close()
    return None if gathered is None else gathered[groups.shard_order].flatten().tolist()


@pytest.mark.distributed
@pytest.mark.parametrize("order", ["sp_inner", "tp_inner"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_rank_0_alone_gets_the_shards_and_knows_their_order(rank_pool, backend, order):
    assert rank_pool(4).run(gather_shards, backend, 2, order) == [[0.0, 1.0, 2.0, 3.0], None, None, None]


def test_a_single_rank_keeps_its_shard():
    shard = torch.ones(1, 1)
    layout = Layout(Mode(1, 1))
    assert torch.equal(build_groups(layout, layout.modes, CPU, num_ranks=1).gather_to_first(shard), shard[None])


def exchange_messages(backend, sizes):
    layout = Layout(Mode(3, 1))
    groups = build_groups(layout, layout.modes, CPU, collectives=backend)
    messages = [bytes((position + size) % 251 for position in range(size)) for size in sizes]
    for message in messages:
        if groups.is_first:
            groups.mailbox.send(message)
        else:
            assert groups.mailbox.receive() == message
    groups.close()


@pytest.mark.distributed
@pytest.mark.parametrize("backend", BACKENDS)
def test_messages_of_any_length_arrive_in_order(rank_pool, backend):
    sizes = [1, 0, 4096, 4097, 16_376, 16_377, 100_000, 1_000_000, 3] * 3 + list(range(1, 100))
    rank_pool(3).run(exchange_messages, backend, sizes)
