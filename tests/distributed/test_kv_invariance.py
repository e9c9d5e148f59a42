"""KV-cache invariance: the bytes a rank caches for a token do not depend on the mode the step ran in.

Compared directly on every rank, keys and values of all layers, SP against TP against modes mixed at random. Not
bitwise: a projection of t tokens by 1/tp of the rows is another matrix product in each mode, and the sum over the TP
group adds the same numbers in another order, so float32 values may differ in their last bits. A wrong head, token,
position or slot differs by about one.
"""

import random

import pytest
import torch

from tests.equivalence.tiny_models import make_prompts
from tests.tiny import settings, tiny_llama
from ulysses_infer import SamplingParams, init_inference
from ulysses_infer.arithmetic import ceil_div

TOLERANCE = 5e-6  # of the largest cached value: float32, summed in another order, on any kind of processor
CASES = [
    (2, 1, "sp_inner", 2),
    pytest.param(2, 1, "sp_inner", 1, marks=pytest.mark.thorough),
    pytest.param(4, 1, "sp_inner", 8, marks=pytest.mark.thorough),
    (4, 1, "sp_inner", 2),
    pytest.param(2, 2, "sp_inner", 4, marks=pytest.mark.thorough),
    (2, 2, "tp_inner", 2),
]


class SlotRecorder:
    """Follows a rank's plans and remembers the slot of every token of every sequence."""

    def __init__(self, tables):
        self.apply_plan, self.slots = tables.apply, {}
        tables.apply = self.apply

    def apply(self, plan):
        arrays = self.apply_plan(plan)
        handles = [item.handle for item in plan.items for _ in range(item.num_tokens)]
        (group,) = arrays.groups
        for handle, position, slot in zip(handles, arrays.positions.tolist(), group.slots.tolist(), strict=True):
            self.slots[handle, position] = slot
        return arrays

    def take(self):
        """Slots in order of sequence and position, with their owners; clears the record."""
        first = min(handle for handle, _ in self.slots)
        ordered = sorted(self.slots.items())
        self.slots = {}
        return [(handle - first, position) for (handle, position), _ in ordered], torch.tensor([s for _, s in ordered])


def cached(engine, recorder, choose_mode, prompts):
    """Run the prompts and read what every layer of this rank cached: [(keys, values)], and the owners of the tokens."""
    if engine.is_first:
        engine._engine.choose_mode = choose_mode
    engine.generate(prompts, SamplingParams(temperature=0, max_tokens=6, ignore_eos=True))
    owners, slots = recorder.take()
    cache = engine._rank.worker.cache
    return owners, [cache.read(layer, slots) for layer in range(cache.shape.num_layers)]


def compare_modes(folder, sp, tp, order, prompts):
    """On a rank: (modes compared, values compared, heads cached, largest difference, bitwise equal?)."""
    changes = {
        "parallel.rank_order": order,
        "cache.enable_prefix_caching": False,
        "scheduler.max_num_batched_tokens": 16,
    }
    with init_inference(folder, **settings(sp, tp, **changes)) as engine:
        recorder = SlotRecorder(engine._rank.worker.tables)
        modes = engine.config.parallel.available_modes
        shuffled = random.Random(0)
        choices = [lambda _, mode=mode: mode for mode in modes] + [lambda _: shuffled.choice(modes)]
        runs = [cached(engine, recorder, choose, prompts) for choose in choices]
        heads = engine._rank.worker.cache.shape.layers[0].num_key_value_heads
    (owners, reference), difference, equal, count = runs[0], 0.0, True, 0
    for others, layers in runs[1:]:
        assert others == owners, "the same tokens were computed"
        for pair, expected in zip(layers, reference, strict=True):
            for found, wanted in zip(pair, expected, strict=True):
                difference = max(difference, float((found - wanted).abs().max() / wanted.abs().max()))
                equal &= torch.equal(found, wanted)
                count += found.numel()
    assert min(float(keys.abs().mean()) for keys, _ in reference) > 0.1, "there is something to compare"
    return len(runs), count, heads, difference, equal


@pytest.mark.distributed
@pytest.mark.parametrize(("sp", "tp", "order", "key_value_heads"), CASES)
def test_every_mode_writes_the_same_cache(tmp_path, rank_pool, sp, tp, order, key_value_heads):
    tiny_llama(tmp_path, num_key_value_heads=key_value_heads)
    check_modes(tmp_path, rank_pool, sp, tp, order, key_value_heads)


@pytest.mark.thorough
@pytest.mark.distributed
@pytest.mark.parametrize(
    ("sp", "tp", "query_heads", "key_value_heads"), [(2, 1, 9, 3), (4, 1, 14, 2), (2, 2, 9, 9), (4, 1, 3, 3)]
)
def test_padded_heads_are_cached_alike_in_every_mode(tmp_path, rank_pool, sp, tp, query_heads, key_value_heads):
    sizes = {"num_attention_heads": query_heads, "num_key_value_heads": key_value_heads}
    tiny_llama(tmp_path, hidden_size=8 * query_heads, **sizes)
    check_modes(tmp_path, rank_pool, sp, tp, "sp_inner", key_value_heads)


def check_modes(tmp_path, rank_pool, sp, tp, order, key_value_heads):
    """Every rank caches the same in all modes of a base, within rounding."""
    prompts = make_prompts(99, (1, 7, 21, 38))
    results = rank_pool(sp * tp).run(compare_modes, str(tmp_path), sp, tp, order, prompts)
    tokens = 1 + 7 + 21 + 38 + 4 * 5
    for runs, count, heads, difference, _ in results:
        assert runs == len([mode for mode in (1, 2, 4) if mode <= sp]) + 1
        assert heads == ceil_div(key_value_heads, sp * tp)
        assert count == (runs - 1) * 2 * 2 * tokens * heads * 8
        assert difference <= TOLERANCE
