"""Sleep and wake-up at each level: caches and weights come back at other addresses, and no graph reads the old ones."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.engine.test_states import hybrid
from tests.equivalence.conftest import reference as reference
from tests.tiny import settings
from tests.worker.graphs.test_cuda_graphs import BACKENDS, Driver, make_worker
from ulysses_infer import SamplingParams, init_inference
from ulysses_infer.attention.torch_loop import TorchLoopAttention
from ulysses_infer.config import load_config
from ulysses_infer.job.start_rank import start_rank
from ulysses_infer.job.weights import sleep, update_weights, wake_up
from ulysses_infer.native.library import is_available

LEVELS = [1, 2]
SCORED = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, logprobs=0)
STEPS = 16


def addresses(worker):
    """Where caches, recurrent states and weights are."""
    cache = [tensor.data_ptr() for tensor in (*worker.cache.keys, *worker.cache.values) if tensor.numel()]
    states = [] if worker.states is None else [worker.states.memory.data_ptr()]
    return {"cache": {*cache, *states}, "weights": {each.data_ptr() for each in worker.model.module.parameters()}}


def occupy(worker):
    """Tensors where caches and weights were, so that they come back elsewhere."""
    tensors = [*worker.cache.keys, *worker.cache.values, *worker.model.module.parameters()]
    tensors += [] if worker.states is None else [worker.states.memory]
    sizes = [tensor.nbytes for tensor in tensors for _ in range(2)]
    return lambda: [torch.empty(size, dtype=torch.uint8) for size in sizes]


# -- CPU graphs ------------------------------------------------------------------------------------------------------


def answers(engine, prompts):
    outputs = [output.outputs[0] for output in engine.generate(prompts, SCORED)]
    chosen = [
        [entry[token].logprob for token, entry in zip(each.token_ids, each.logprobs, strict=True)] for each in outputs
    ]
    return [each.token_ids for each in outputs], chosen


def sleep_on_cpu(model, base, prompts, level, weights):
    """On a rank: outputs before and after, and how many steps were recorded before, while asleep and after."""
    with init_inference(model, **settings(*base)) as engine:
        worker = engine._rank.worker
        before = answers(engine, prompts), worker.graphs.num_recorded
        old, fill = addresses(worker), occupy(worker)
        engine.sleep(level)
        asleep = worker.graphs.num_recorded
        kept = fill()
        engine.wake_up()
        if level == 2:
            engine.update_weights(weights)
        new = addresses(worker)
        after = answers(engine, prompts), worker.graphs.num_recorded
        del kept
        return before, asleep, after, {name: old[name] == new[name] for name in old}


@pytest.mark.skipif(not is_available("cpu_graph"), reason="no C compiler here")
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize(
    ("family", "base"),
    [
        ("llama", (1, 1)),
        pytest.param("llama", (2, 1), marks=[pytest.mark.distributed, pytest.mark.thorough]),
        pytest.param("deepseek_v3", (1, 2), marks=[pytest.mark.distributed, pytest.mark.thorough]),
    ],
)
def test_cpu_graphs_are_recorded_again(rank_pool, reference, family, base, level):
    expected = reference(family)
    folder = str(expected.folder)
    found = rank_pool(base[0] * base[1]).run(sleep_on_cpu, folder, base, expected.prompts, level, folder)
    for (before, recorded), asleep, (after, again), same in found:
        assert after[0] == before[0]
        for row, wanted in zip(after[1], before[1], strict=True):
            assert row == pytest.approx(wanted, abs=1e-4)
        assert (recorded > 0, asleep, again > 0) == (True, 0, True)
        assert same == {"cache": False, "weights": level == 1}


@pytest.mark.skipif(not is_available("cpu_graph"), reason="no C compiler here")
@pytest.mark.thorough
@pytest.mark.parametrize("level", LEVELS)
def test_cpu_graphs_of_recurrent_layers_are_recorded_again(level):
    prompts = [[5, 6, 7, 8, 9], [9, 8, 7]]
    (before, recorded), asleep, (after, again), same = sleep_on_cpu(hybrid(), (1, 1), prompts, level, hybrid())
    assert after == before
    assert (recorded > 0, asleep, again > 0) == (True, 0, True)
    assert same == {"cache": False, "weights": level == 1}


# -- CUDA graphs, by a stand-in --------------------------------------------------------------------------------------


class Reads(TorchDispatchMode):
    """The storages that operators read and did not make: those that a graph has the addresses of, and temporary ones
    that torch makes of Python's values."""

    def __init__(self):
        super().__init__()
        self.read, self._made = {}, {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        for tensor in _tensors((args, kwargs)):
            storage = tensor.untyped_storage()
            if storage._cdata not in self._made:
                self.read[storage._cdata] = StorageWeakRef(storage)
        result = function(*args, **(kwargs or {}))
        for tensor in _tensors(result):
            storage = tensor.untyped_storage()
            if storage._cdata not in self.read:
                self._made[storage._cdata] = storage  # kept, so that no other gets its number
        return result


def _tensors(tree):
    return [each for each in tree_leaves(tree) if isinstance(each, torch.Tensor)]


class RememberingCapturer:
    """Stands for CUDA graphs on a CPU: a replay needs all memory that the captured step has read, and repeats it."""

    def __init__(self):
        self.captured = self.replays = 0

    def capture(self, step):
        step()
        with Reads() as reads:
            step()
        self.captured += 1
        capturer, memory = self, [each for each in reads.read.values() if not each.expired()]

        class Graph:
            def replay(self):
                assert not any(each.expired() for each in memory), "the graph would read memory that was given back"
                capturer.replays += 1
                step()

        return Graph()


def run_steps(eager, captured, modes, spans, seed):
    """Rows compared and the largest difference."""
    driver, count, difference = Driver(modes, spans, seed), 0, 0.0
    for step in range(STEPS):
        plan = driver.plan(step)
        found, wanted = [], []
        eager.run(plan._replace(token_ids=driver.known, keeps_tokens=False), driver.keep(wanted))
        captured.run(plan, driver.keep(found))
        for rows, others in zip(found, wanted, strict=True):
            count += len(rows)
            difference = max(difference, float((rows - others).abs().max()))
    return count, difference


def sleep_with_captured_steps(folder, level, forgets):
    """On a rank: rows and the largest difference after waking up, captures before and after, and replays after.

    forgets: whether the graphs are told, as `sleep` does.
    """
    rank = start_rank(load_config({"model.path": folder, **settings()}))
    try:
        capturer, spans = RememberingCapturer(), rank.worker.cache.groups.attention_spans
        eager, captured = (
            make_worker(rank, TorchLoopAttention()),
            make_worker(rank, BACKENDS["flash_attn"](), capturer),
        )
        modes = list(rank.groups.by_mode)
        captured.graphs.capture_all()
        before = capturer.captured
        if not forgets:
            captured.graphs.invalidate = lambda: None
        sleep(dataclasses.replace(rank, worker=captured), level)
        wake_up(dataclasses.replace(rank, worker=captured))
        if level == 2:
            update_weights(rank, folder)
        count, difference = run_steps(eager, captured, modes, spans, seed=3)
        return count, difference, before, capturer.captured - before, capturer.replays
    finally:
        rank.groups.close()


@pytest.mark.parametrize("level", LEVELS)
def test_cuda_graphs_are_captured_again(rank_pool, folder, level):
    ((count, difference, before, again, replays),) = rank_pool(1).run(sleep_with_captured_steps, folder, level, True)
    assert count > 10
    assert difference < 1e-4
    assert (before > 0, again > 0, replays > 3) == (True, True, True)


def test_the_stand_in_notices_a_graph_of_old_memory(rank_pool, folder):
    with pytest.raises(Exception, match="would read memory that was given back"):
        rank_pool(1).run(sleep_with_captured_steps, folder, 1, False)
