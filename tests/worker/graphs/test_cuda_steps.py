"""Steps scheduled ahead on a real GPU; skipped without one."""

import pytest
import torch

from tests.engine.test_async_steps import FREE, PROMPTS
from tests.model.sampling_rows import random_logits, row
from tests.tiny import settings
from ulysses_infer import init_inference
from ulysses_infer.model.sampling.sampler import Sampler
from ulysses_infer.worker.transfer import DeviceToHostCopy

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.parametrize("eager", [True, None])
def test_tokens_are_those_of_synchronous_steps(folder, eager):
    found = []
    for is_async in (False, True):
        changes = {"runtime.device": "cuda", "runtime.enforce_eager": eager, "scheduler.async_scheduling": is_async}
        with init_inference(folder, **settings(**changes)) as engine:
            outputs = engine.generate(PROMPTS, FREE, arrival_steps=[2 * index for index in range(len(PROMPTS))])
            found.append([[output.token_ids for output in whole.outputs] for whole in outputs])
    assert found[0] == found[1]


def test_choosing_tokens_does_not_wait_for_the_gpu():
    rows = [
        row(temperature=0),
        row(seed=1),
        row(seed=2, top_k=5, top_p=0.7),
        row(seed=3, min_p=0.1),
        row(seed=4, logit_bias={3: 2.0}, allowed_token_ids=[1, 2, 3], min_tokens=3, eos=frozenset({2})),
    ]
    logits = random_logits(len(rows), 40).cuda()
    wanted = Sampler().sample(logits, rows)
    torch.cuda.set_sync_debug_mode("error")
    try:
        arrival = DeviceToHostCopy(Sampler().choose(logits, rows))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert arrival.wait() == wanted
