"""Steps of tiny models of every kind on device `meta`, in SP and TP mode: nothing prevents their capture."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.equivalence.families import EXPERT_FAMILIES, FAMILIES, FEATURES
from tests.model.quantization.checkpoints import FORMATS
from tests.model.quantization.mixtures import MIXTURES
from tests.model.sampling_rows import random_logits, row
from tests.worker.graphs.capturing import META, MIXED, CheckingCapturer, capture, make_rank, run_step, write_tiny
from ulysses_infer.attention.backend import AttentionMetadata, AttentionOptions
from ulysses_infer.errors import ConfigError
from ulysses_infer.kernels.launch import assume
from ulysses_infer.model.sampling.sampler import Sampler
from ulysses_infer.worker.graphs.capture_checker import CaptureChecker

pytest.importorskip("triton")

from ulysses_infer.attention.triton import TritonAttention

DENSE = ("llama", "qwen2", "qwen3", "gemma3_text")
EXPERTS = ("qwen3_moe", "mixtral", "deepseek_v3", "llama4_text", "gpt_oss")
QUANTISED = ("compressed-channel", "fp8-block", "awq")


def cases(default: tuple[str, ...], every: Any) -> list[Any]:
    """`default`, and the others in thorough runs."""
    rest = [pytest.param(name, marks=pytest.mark.thorough) for name in every if name not in default]
    return [*default, *rest]


def check(folder: Path, ranks: int = 2, **changes: Any) -> None:
    with assume("meta", (9, 0)):
        capturer = capture(make_rank(folder, ranks, **changes))
    assert all(step.allocations for step in capturer.steps)
    assert capturer.kept == []


@pytest.mark.parametrize("family", cases(DENSE, sorted({**FAMILIES, **FEATURES}.keys() - EXPERT_FAMILIES.keys())))
def test_steps_of_dense_models_can_be_captured(family: str, tmp_path: Path) -> None:
    check(write_tiny(tmp_path, family))


@pytest.mark.parametrize("family", cases(EXPERTS, EXPERT_FAMILIES))
def test_steps_of_mixtures_of_experts_can_be_captured(family: str, tmp_path: Path) -> None:
    check(write_tiny(tmp_path, family), **{"model.max_model_len": 128})


@pytest.mark.parametrize("name", cases(("qwen3-fp8",), MIXTURES))
def test_steps_of_quantised_experts_can_be_captured(name: str, tmp_path: Path) -> None:
    mixture = MIXTURES[name]
    check(
        write_tiny(tmp_path, mixture.family, mixture.format.config, **mixture.changes), **{"model.max_model_len": 128}
    )


@pytest.mark.parametrize("name", cases(QUANTISED, FORMATS))
def test_steps_of_quantised_models_can_be_captured(name: str, tmp_path: Path) -> None:
    check(write_tiny(tmp_path, "llama", FORMATS[name].config, num_hidden_layers=1))


@pytest.mark.parametrize("dtype", ["fp8", "float16"])
def test_steps_with_a_cache_of_another_dtype_can_be_captured(dtype: str, tmp_path: Path) -> None:
    check(write_tiny(tmp_path, "llama"), **{"cache.dtype": dtype})


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "qwen3_moe", "deepseek_v3"])
def test_steps_do_not_wait_for_the_device(family: str, tmp_path: Path) -> None:
    """Neither layer by layer nor around replays, of decodes and of steps with prompts; some need no logits."""
    room = {"scheduler.max_num_batched_tokens": 256, "scheduler.max_num_seqs": 8, "cache.num_blocks": 256}
    with assume("meta", (9, 0)):
        rank = make_rank(write_tiny(tmp_path, family), 2, **{"model.max_model_len": 128, **room})
        with CaptureChecker(META, assumes_pinned=True):
            for mode, eager in itertools.product(rank.groups.by_mode, (False, True)):
                assert run_step(rank, mode, (1, 1, 1), eager).shape[0] == 2
                captured_prompts = rank.worker.mixed_graphs is not None
                assert run_step(rank, mode, MIXED, eager or not captured_prompts).shape[0] == 4


def test_choosing_tokens_does_not_wait_for_the_device() -> None:
    rows = [
        row(temperature=0),
        row(seed=1),
        row(seed=2, top_k=5, top_p=0.7),
        row(seed=3, min_p=0.1),
        row(seed=4, logit_bias={3: 2.0}, allowed_token_ids=[1, 2, 3], min_tokens=3, eos=frozenset({2})),
    ]
    logits = random_logits(len(rows), 40).to(META)
    with assume("meta", (9, 0)), CaptureChecker(META, assumes_pinned=True):
        assert Sampler().choose(logits, rows).shape == (len(rows),)


class FaultyAttention(TritonAttention):
    """Reads the context lengths, as kernels that are planned from the device do."""

    def attend(
        self,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        metadata: AttentionMetadata,
        options: AttentionOptions,
    ) -> torch.Tensor:
        assert metadata.kernel is not None
        metadata.kernel.context_lens.max().item()
        return super().attend(query, keys, values, metadata, options)


def test_what_prevents_capture_is_named_with_its_line(tmp_path: Path) -> None:
    with assume("meta", (9, 0)):
        rank = make_rank(write_tiny(tmp_path, "llama"), 2)
        with pytest.raises(ConfigError) as raised:
            capture(rank, backend=FaultyAttention())
    message = str(raised.value)
    assert message.startswith("a decode step of 2 rows in mode sp2xtp1 cannot be captured (aten._local_scalar_dense")
    assert "reads from the device, at worker/graphs/test_cuda_capture.py:" in message
    assert "called from ulysses_infer/model/layers/attention.py:" in message
    assert message.endswith("set runtime.enforce_eager=true")
    assert "\n" not in message


class RefusingCapturer:
    """Fails as CUDA does, without naming the operator."""

    def capture(self, step: Callable[[], None]) -> CheckingCapturer:
        raise RuntimeError("operation not permitted when stream is capturing")


@pytest.mark.parametrize(("ranks", "named"), [(1, True), (2, False)])
def test_a_failed_capture_names_its_cause_where_no_rank_waits_for_another(
    ranks: int, named: bool, tmp_path: Path
) -> None:
    with assume("meta", (9, 0)):
        rank = make_rank(write_tiny(tmp_path, "llama"), ranks)
        with pytest.raises(ConfigError) as raised:
            capture(rank, backend=FaultyAttention(), capturer=RefusingCapturer())
    assert ("reads from the device, at worker/graphs/test_cuda_capture.py:" in str(raised.value)) == named
    assert ("operation not permitted" in str(raised.value)) == (not named)
