"""The engine with its native kernels and with torch alone."""

import pytest

from tests.tiny import settings
from ulysses_infer import SamplingParams, init_inference

PROMPTS = ["hello", [5, 6, 7, 8, 9], "the quick brown fox jumps over the lazy dog " * 2]
GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, logprobs=2)


def outputs_of(folder, backend):
    runtime = {"attention_backend": backend, "matmul_backend": backend}
    with init_inference(folder, **settings(runtime=runtime)) as engine:
        worker = engine._rank.worker
        used = worker.backend.name, worker.matmul.name if worker.matmul else "torch"
        return used, [output.outputs[0] for output in engine.generate(PROMPTS, GREEDY)]


def test_native_kernels_generate_what_torch_does(folder):
    used, wanted = outputs_of(folder, "torch")
    assert used == ("torch", "torch")
    used, found = outputs_of(folder, "native")
    assert used == ("native", "native")
    for one, other in zip(found, wanted, strict=True):
        assert one.token_ids == other.token_ids
        assert one.cumulative_logprob == pytest.approx(other.cumulative_logprob, abs=1e-3)
