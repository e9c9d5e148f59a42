"""Captured decode steps, with a capturer that repeats the recorded call: the same results as layer by layer.

What attention reads is a stand-in of a GPU library on static tensors, so a step that looked at anything of the moment
it was recorded, or that left anything of an earlier step in its inputs, would give other logits.
"""

import random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.attention import cuda_fakes
from tests.equivalence.families import tiny_config
from tests.equivalence.tiny_models import make_checkpoint
from tests.tiny import settings as engine_settings
from ulysses_infer.attention.flash_attn import FlashAttnAttention
from ulysses_infer.attention.flashinfer import FlashInferAttention
from ulysses_infer.attention.torch_loop import TorchLoopAttention
from ulysses_infer.cache.paged import PagedCache
from ulysses_infer.cache.pools import BlockPools
from ulysses_infer.config import load_config
from ulysses_infer.errors import ConfigError
from ulysses_infer.job.start_rank import start_rank
from ulysses_infer.parallel.layout import Mode
from ulysses_infer.worker.block_tables import BlockTables, GroupArrays, StepArrays
from ulysses_infer.worker.graphs.cuda_graphs import (
    CudaGraphRunner,
    bucket_sizes,
    wants_cuda_graphs,
)
from ulysses_infer.worker.graphs.static_inputs import CudaGroupInputs, CudaInputs
from ulysses_infer.worker.next_tokens import NextTokenBuffer
from ulysses_infer.worker.step import Step
from ulysses_infer.worker.step_plan import DRAFT_LOGITS, LAST_LOGITS, NO_LOGITS, PlanItem, StepPlan, placeholder
from ulysses_infer.worker.transfer import PackedInputs
from ulysses_infer.worker.worker import Worker

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
BACKENDS = {
    "flash_attn": lambda: FlashAttnAttention(cuda_fakes.flash_attn_varlen_func),
    "flashinfer": lambda: FlashInferAttention(cuda_fakes.FlashInfer(), CPU),
}
STEPS, PROMPTS, LARGEST = 24, 5, 8


@given(st.integers(1, 1500), st.sampled_from([1, 2, 3, 4, 8]))
def test_buckets_are_even_over_the_slices_and_waste_little(max_num_seqs, sp):
    sizes = bucket_sizes(max_num_seqs, sp)
    assert sizes == sorted(set(sizes))
    assert all(size % sp == 0 and size > 0 for size in sizes)
    limit = min(max_num_seqs, 1024)
    assert limit <= sizes[-1] < limit + sp
    for rows in range(1, limit + 1):
        size = next(size for size in sizes if size >= rows)
        assert size <= max(2 * rows, rows + sp) if rows <= 16 else size - rows <= max(rows // 2, sp)


class CountingCapturer:
    """Stands for CUDA graphs on a CPU: a replay calls the captured step again. Counts captures and replays."""

    def __init__(self):
        self.captured, self.replays = 0, 0

    def capture(self, step):
        step()
        self.captured += 1

        class Counting:
            @staticmethod
            def replay():
                self.replays += 1
                step()

        return Counting


class Driver:
    """Random traffic over one rank: the plans are the same on all of them."""

    def __init__(self, modes, attention_spans, seed):
        self.random, self.modes = random.Random(seed), modes
        self.tokens, self.blocks, self.tables, self.done = {}, {}, {}, {}
        self.pools, self.sequence, self.next_handle = (
            BlockPools([40] * len(attention_spans), 4, attention_spans=attention_spans),
            0,
            0,
        )
        self.chosen, self.rows_before, self.num_placeholders = [], {}, 0  # tokens of the last step's rows, and whose

    def plan(self, step):
        """A new prompt, or decodes of some of the sequences; now and then one ends.

        Some of its tokens are placeholders for those of the step before; `known` are their values.
        """
        dropped = []
        if step < PROMPTS or self.random.random() < 0.15:
            handle, self.next_handle = self.next_handle, self.next_handle + 1
            self.tokens[handle] = [self.random.randrange(90) for _ in range(self.random.choice([1, 2, 5, 11]))]
            self.done[handle], self.blocks[handle], self.tables[handle] = 0, 0, [[] for _ in self.pools.pools]
            others = [each for each in self.tokens if each != handle]
            chosen = [handle, *self.random.sample(others, self.random.randint(0, min(3, len(others))))]
        else:
            if len(self.tokens) > 3 and self.random.random() < 0.3:
                dropped = [self.random.choice(list(self.tokens))]
                del self.tokens[dropped[0]]
            chosen = self.random.sample(list(self.tokens), self.random.randint(1, len(self.tokens)))
        items, ids, known, rows, tokens = [], [], [], {}, []
        for handle in chosen:
            own, start = self.tokens[handle], self.done[handle]
            self.pools.free_out_of_window_blocks(self.tables[handle], self.blocks[handle], start, len(own))
            drafts = self._drafts(own, start)
            blocks = max(self.blocks[handle], -(-(len(own) + len(drafts)) // 4))
            new = self.pools.extend(self.tables[handle], blocks - self.blocks[handle])
            self.blocks[handle] = blocks
            logits = NO_LOGITS if len(chosen) > 1 and self.random.random() < 0.2 else LAST_LOGITS
            logits = DRAFT_LOGITS if drafts else logits
            items.append(PlanItem(handle, start, len(own) + len(drafts) - start, new, logits))
            ids += own[start:]
            known += own[start:]
            if handle in self.rows_before and self.random.random() < 0.7:
                ids[-1] = placeholder(self.rows_before[handle])
                self.num_placeholders += 1
            ids += drafts
            known += drafts
            self.done[handle] = len(own)
            own.append((7 * sum(own) + step) % 90)  # any token will do: what is compared are logits
            if logits != NO_LOGITS:
                rows[handle] = len(tokens)
                tokens += [own[-1], *drafts]  # all drafts are rejected
        self.sequence += 1
        mode, keeps_tokens = self.random.choice(self.modes), self.random.random() < 0.7
        self.chosen, self.rows_before = tokens, rows if keeps_tokens else {}
        self.known = np.array(known, dtype=np.int32)
        ids = np.array(ids, dtype=np.int32)
        return StepPlan(self.sequence, mode, items, ids, dropped, full_logits=True, keeps_tokens=keeps_tokens)

    def _drafts(self, own, start):
        """Tokens that a decode verifies, sometimes."""
        is_decode = start + 1 == len(own)
        count = self.random.randint(1, 3) if is_decode and self.random.random() < 0.2 else 0
        return [self.random.randrange(90) for _ in range(count)]

    def keep(self, found):
        """What chooses the tokens of rows, and keeps the rows in `found`."""

        def choose(start, rows):
            found.append(rows.clone())
            return torch.tensor(self.chosen[start : start + len(rows)])

        return choose


def make_worker(rank, backend, capturer=None):
    """A second worker over the same model, with a cache of its own and graphs if there is a capturer."""
    worker = rank.worker
    shape, groups = worker.cache.shape, worker.cache.groups
    cache = PagedCache(shape, [40] * len(groups.attention_spans), CPU, scratch_blocks=1, groups=groups)
    for pool in (*cache.keys, *cache.values):
        pool.fill_(float("nan"))
    longest = shape.blocks_for(worker.model.shape.max_model_len)
    tables = BlockTables(shape.block_size, 64, longest, groups.attention_spans)
    made = Worker(worker.model, cache, tables, rank.groups, backend, None, CPU)
    made.eager.inputs = PackedInputs(CPU)
    if capturer is not None:
        made.graphs = CudaGraphRunner(
            worker.model, cache, rank.groups, backend, made.eager.inputs, capturer, CPU, max_rows=LARGEST
        )
    return made


def compare(folder, sp, tp, name, lazily, seed):
    """On a rank: rows compared, the largest difference, what was captured and replayed."""
    rank = start_rank(load_config({"model.path": folder, **engine_settings(sp, tp)}))
    try:
        capturer = CountingCapturer()
        eager, captured = make_worker(rank, TorchLoopAttention()), make_worker(rank, BACKENDS[name](), capturer)
        if not lazily:
            captured.graphs.capture_all()
        driver = Driver(list(rank.groups.by_mode), rank.worker.cache.groups.attention_spans, seed)
        count, difference = 0, 0.0
        for step in range(STEPS):
            plan = driver.plan(step)
            found, wanted = [], []
            known = plan._replace(token_ids=driver.known, keeps_tokens=False)
            assert (eager.run(known, driver.keep(wanted)) is None) == (not wanted)
            captured.run(plan, driver.keep(found))
            if step == STEPS // 2:
                rank.worker.model.rebind()
            for rows, others in zip(found, wanted, strict=True):
                assert rows.isfinite().all()
                count += len(rows)
                difference = max(difference, float((rows - others).abs().max()))
        assert driver.num_placeholders > 3
        assert capturer.captured > (0 if lazily else sum(map(len, captured.graphs.buckets.values()))), "captured again"
        return count, difference, capturer.captured, capturer.replays
    finally:
        rank.groups.close()


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("lazily", [False, True])
def test_a_captured_step_gives_the_logits_of_an_eager_one(rank_pool, folder, name, lazily):
    ((count, difference, captured, replays),) = rank_pool(1).run(compare, folder, 1, 1, name, lazily, 3)
    assert count > 20
    assert difference < 1e-4
    assert captured > 0
    assert replays > 8


@pytest.mark.parametrize("name", BACKENDS)
def test_captured_steps_are_right_where_layers_have_windows_and_blocks_are_given_back(rank_pool, tmp_path, name):
    make_checkpoint(tiny_config("gemma3_text"), tmp_path)
    ((count, difference, captured, replays),) = rank_pool(1).run(compare, str(tmp_path), 1, 1, name, True, 3)
    assert (count > 20, captured > 0, replays > 8) == (True, True, True)
    assert difference < 1e-4


@pytest.mark.distributed
@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("seed", [1, 2])
def test_captured_steps_are_right_on_two_ranks_whose_modes_flip(rank_pool, folder, name, seed):
    first, second = rank_pool(2).run(compare, folder, 2, 1, name, False, seed)
    assert first[0] > 20
    assert first[1] < 1e-4
    assert first[2:] == second[2:], "ranks capture and replay alike"
    assert first[3] > 8


def test_a_static_step_leaves_nothing_of_the_one_before():
    group = CudaGroupInputs(4, torch.full((4, 6), 99, dtype=torch.int32), 64, scratch_block=50)
    static = CudaInputs(4, [group], CPU)
    inputs, sequences = PackedInputs(CPU), group.sequences

    def fill(count, context):
        seen = GroupArrays(np.arange(count) + 10, [context] * count, np.full((count, -(-context // 4)), 7))
        arrays = StepArrays(np.arange(count) + context - 1, [1] * count, [seen], np.arange(count))
        items = [PlanItem(n, context - 1, 1, [], LAST_LOGITS) for n in range(count)]
        plan = StepPlan(0, Mode(1, 1), items, np.arange(count, dtype=np.int32) + 20, [], False)
        return static.fill(Step(plan, arrays, np.arange(count), NextTokenBuffer(None)), 4, inputs)

    fill(4, 17)
    (host,) = fill(2, 5)
    assert static.token_ids.tolist() == [20, 21, 0, 0]
    assert static.positions.tolist() == [4, 5, 0, 0]
    assert group.metadata.slots.tolist() == [10, 11, 200, 200]
    assert sequences.context_lens.tolist() == host.context_lens.tolist() == [5, 5, 1, 1]
    assert sequences.cu_context_lens.tolist() == [0, 5, 10, 11, 12]
    assert sequences.cu_query_lens.tolist() == [0, 1, 2, 3, 4]
    assert sequences.block_tables[:, :2].tolist() == host.block_tables.tolist() == [[7, 7], [7, 7], [50, 50], [50, 50]]
    static.fill(None, 4, inputs)
    assert sequences.context_lens.tolist() == [1, 1, 1, 1]
    assert sequences.block_tables[:, 0].tolist() == [50, 50, 50, 50]


class TestWhetherStepsAreCaptured:
    flash, loop = BACKENDS["flash_attn"](), TorchLoopAttention()

    def test_on_a_gpu_they_are_where_attention_allows(self):
        assert wants_cuda_graphs(None, CUDA, self.flash)
        assert wants_cuda_graphs(False, CUDA, self.flash)
        assert not wants_cuda_graphs(None, CUDA, self.loop)
        assert not wants_cuda_graphs(True, CUDA, self.flash)

    def test_experts_that_wait_for_the_device_are_not_captured(self, caplog):
        with caplog.at_level("INFO", "ulysses_infer"):
            assert not wants_cuda_graphs(None, CUDA, self.flash, "experts are multiplied one by one")
        assert "decode steps of all modes are not captured: experts are multiplied one by one" in caplog.text
        with pytest.raises(ConfigError, match=r"enforce_eager is false, but experts are multiplied one by one"):
            wants_cuda_graphs(False, CUDA, self.flash, "experts are multiplied one by one")

    def test_asking_for_what_attention_cannot_is_an_error(self):
        with pytest.raises(ConfigError, match=r"runtime\.enforce_eager is false, but attention runs on torch"):
            wants_cuda_graphs(False, CUDA, self.loop)

    @pytest.mark.parametrize("value", [None, True, False])
    def test_on_a_cpu_they_never_are(self, value):
        assert not wants_cuda_graphs(value, CPU, self.loop)


def test_a_step_that_cannot_be_captured_is_one_line(rank_pool, folder):
    (message,) = rank_pool(1).run(fail_to_capture, folder)
    assert "\n" not in message
    assert message.startswith("a decode step of 8 rows in mode sp1xtp1 cannot be captured (no such")
    assert "runtime.enforce_eager=true" in message


class Broken:
    def capture(self, step):
        raise RuntimeError("no such operation in a capture\nmore of it")


def fail_to_capture(folder):
    rank = start_rank(load_config({"model.path": folder, **engine_settings()}))
    worker = make_worker(rank, BACKENDS["flash_attn"](), Broken())
    try:
        worker.graphs.capture_all()
    except ConfigError as error:
        return str(error)
    finally:
        rank.groups.close()
    return ""
