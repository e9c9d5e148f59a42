"""TRL's generation through a server."""

from __future__ import annotations

import pytest
import torch

from tests.server.job import Job
from tests.training.test_trl_rollouts import GREEDY, PROMPTS, accelerator_of, check_greedy, load
from ulysses_infer.job.processes import free_port
from ulysses_infer.rl.trl import UlyssesGeneration


@pytest.mark.thorough
@pytest.mark.distributed
def test_a_server_generates_with_the_weights_it_was_sent(long_folder: str) -> None:
    model = load(long_folder)
    options = {"model.dtype": "float32", "runtime.logprobs_mode": "processed_logprobs"}
    with Job(long_folder, **options) as job:
        generation = UlyssesGeneration(
            model,
            accelerator_of(),
            None,
            mode="server",
            server_base_url=job.url,
            admin_api_key="admin",
            group_port=free_port(),
            **GREEDY,
        )
        check_greedy(model, PROMPTS, generation.generate(PROMPTS, None, 1))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(parameter.flip(-1))
        generation.sync_weights()
        check_greedy(model, PROMPTS, generation.generate(PROMPTS, None, 1))
