"""A head's part on each rank, told by hand what to do: a family that the engine does not speculate with, padding."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from tests.distributed.draft_heads import mtp_checkpoint
from tests.tiny import encode, settings
from tests.worker.graphs.capturing import META, capture, make_rank, write_tiny
from ulysses_infer.cache.budget import MemoryBudget
from ulysses_infer.config import load_config
from ulysses_infer.job.draft_head import load_head
from ulysses_infer.job.make_worker import cache_shape
from ulysses_infer.job.start_rank import start_rank
from ulysses_infer.kernels.launch import assume
from ulysses_infer.model.hidden_states import HiddenStates
from ulysses_infer.parallel.layout import Mode, even_span
from ulysses_infer.worker.block_tables import BlockTables
from ulysses_infer.worker.drafting.messages import Chain, Follow
from ulysses_infer.worker.drafting.messages import encode as encode_message
from ulysses_infer.worker.step import Step
from ulysses_infer.worker.step_plan import NO_LOGITS, PlanItem, StepPlan

TEXT = encode("the quick brown fox jumps")
BLOCK = 4


def drafts_of(folder, text, states, num_tokens):
    """What the module of the checkpoint drafts after `text`. states: of all its tokens but the last, given by hand."""
    rank = start_rank(load_config({"model.path": folder, **settings(1)}))
    try:
        config = load_config({"model.path": folder, **settings(1), "speculation.method": "mtp"})
        served = SimpleNamespace(model=rank.worker.model, weights=rank.weights)
        head = load_head(config, served, rank.channel, rank.groups, rank.worker.device)
        drafter = head.make(rank.worker, rank.worker.device)
        tables, count = BlockTables(BLOCK, 2, 16), len(text) - 1
        item = PlanItem(0, 0, count, [5, 3, 9, 1, 7, 2][: -(-count // BLOCK)], NO_LOGITS)
        plan = StepPlan(0, Mode(1, 1), [item], np.array(text[:-1], dtype=np.int32), [], full_logits=False)
        head.hidden.keep_output(states)
        drafter.observe(Step(plan, tables.apply(plan), np.zeros(0), rank.worker.next_tokens), count)
        drafter.run(encode_message(Follow([count - 1], [text[-1]], [0])))
        return [copy.wait()[0] for copy in drafter.draft(encode_message(Chain([0], num_tokens)))]
    finally:
        rank.groups.close()


THOROUGH = pytest.mark.thorough


@pytest.mark.parametrize("length", [17, pytest.param(20, marks=THOROUGH), pytest.param(22, marks=THOROUGH)])
def test_the_module_of_qwen3_next_drafts_as_described(tmp_path, rank_pool, length):
    head = mtp_checkpoint("qwen3_next", tmp_path)  # the last block of the text is full, or is not
    text = TEXT[:length]
    with torch.inference_mode():
        states = head.states_of_served(torch.tensor([text[:-1]]))[0]
    (drafts,) = rank_pool(1).run(drafts_of, str(tmp_path), text, states, 6)
    assert drafts == head.drafts(text, 6)


def memory_taken(folder, available):
    """Bytes of `available` that the blocks of the model and its head take together, and those of the head besides."""
    rank = start_rank(load_config({"model.path": folder, **settings(1)}))
    try:
        config = load_config({"model.path": folder, **settings(1), "speculation.method": "mtp"})
        served = SimpleNamespace(model=rank.worker.model, weights=rank.weights)
        head = load_head(config, served, rank.channel, rank.groups, rank.worker.device)
        left = head.within(MemoryBudget(available, 0, 0), served).left
        each = [cache_shape(config, model, rank.groups).bytes_per_block for model in (served.model, head.head)]
        blocks = left // each[0]
        drafting = head.make(rank.worker, rank.worker.device).cache.num_blocks - rank.worker.cache.num_blocks
        besides = head.head.weight_bytes + head.hidden.num_bytes + drafting * each[1]
        return blocks * sum(each), besides, sum(each)
    finally:
        rank.groups.close()


@pytest.mark.thorough
def test_the_blocks_of_model_and_head_fill_the_memory_together(tmp_path, rank_pool):
    mtp_checkpoint("qwen2", tmp_path)
    available = 4 << 20
    ((cache, besides, block),) = rank_pool(1).run(memory_taken, str(tmp_path), available)
    assert available - 2 * block < cache + besides <= available


def aligned(folder, num_tokens, num_rows):
    """The rows, as numbers, that a rank's slice of a step has after it ran with padding."""
    rank = start_rank(load_config({"model.path": folder, **settings(2), "speculation.method": "mtp"}))
    try:
        mode, drafter = Mode(2, 1), rank.worker.drafter
        place = rank.groups.place(mode).token_index
        ran = even_span(num_rows, place, 2)
        width = rank.worker.model.shape.hidden_size
        drafter.hidden.keep_output(torch.arange(ran.start, ran.stop)[:, None].expand(-1, width).float())
        plan = StepPlan(0, mode, [], np.zeros(num_tokens, dtype=np.int32), [], full_logits=False)
        found = drafter._aligned_hidden(plan, num_rows)[:, 0].int().tolist()
        wanted = even_span(num_tokens, place, 2)
        return found, list(range(wanted.start, wanted.stop))
    finally:
        rank.groups.close()


@pytest.mark.distributed
@pytest.mark.parametrize(("num_tokens", "num_rows"), [(5, 8), pytest.param(3, 8, marks=THOROUGH)])
def test_padding_of_captured_steps_is_left_out(tmp_path, rank_pool, num_tokens, num_rows):
    mtp_checkpoint("qwen2", tmp_path)
    for found, wanted in rank_pool(2).run(aligned, str(tmp_path), num_tokens, num_rows):
        assert found == wanted


@pytest.mark.thorough
@pytest.mark.parametrize("layers", [(), (0, 1, 1)])
def test_steps_that_keep_hidden_states_can_be_captured(tmp_path, layers):
    pytest.importorskip("triton")
    with assume("meta", (9, 0)):
        rank = make_rank(write_tiny(tmp_path, "llama"), 2)
        width = rank.model.shape.hidden_size
        rank.model.keep_hidden(HiddenStates(layers, 128, width, rank.model.dtype, META))
        capturer = capture(rank)
    assert all(step.allocations for step in capturer.steps)
    assert capturer.kept == []
