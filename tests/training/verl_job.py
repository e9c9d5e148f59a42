"""A program with verl and Ray: verl's registries make our replica and our rollout, which serve the demo model.

Arguments: the model's folder, tensor_model_parallel_size, data_parallel_size. Prints what the test checks as one line
of JSON. `VERL_USE_EXTERNAL_MODULES=ulysses_infer.rl.verl` must be set.
"""

from __future__ import annotations

import asyncio
import json
import math
import os
import sys
from typing import Any

import ray
import torch
from transformers import AutoModelForCausalLM
from verl.workers.config import HFModelConfig, RolloutConfig
from verl.workers.rollout.base import get_rollout_class
from verl.workers.rollout.replica import get_rollout_replica_class

from tests.training.rollout_server import modes, wait_for_first_tokens

NUM_RUNNING, LENGTH = 4, 400
SETTINGS = {
    "server": {"heartbeat_timeout": 60},
    "cache": {"num_blocks": 512},
    "runtime": {"device": "cpu", "threads_per_rank": 1},
    "policy": {"threshold_tokens": 2},  # one request decodes with tensor parallelism, several with sequence parallelism
}


def send_weights(worker: Any, folder: str, scale: float, steps: int) -> str:
    """In a worker of verl: new weights through the rollout that verl's registry made; returns its class."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    weights = ((name, tensor * scale) for name, tensor in model.state_dict().items())
    asyncio.run(worker.server_adapter.update_weights(weights, global_steps=steps))
    return type(worker.server_adapter).__name__


async def send_from_all(replica: Any, folder: str, scale: float, steps: int) -> str:
    """New weights from every worker, as verl's trainer sends them; returns the class of the rollout."""
    sends = [worker.__ray_call__.remote(send_weights, folder, scale, steps) for worker in replica.workers]
    (found,) = set(await asyncio.gather(*sends))
    return str(found)


async def run(folder: str, tensor_parallel: int, data_parallel: int) -> dict[str, Any]:
    config = RolloutConfig(
        name="ulysses_infer",
        tensor_model_parallel_size=tensor_parallel,
        data_parallel_size=data_parallel,
        n_gpus_per_node=tensor_parallel * data_parallel,
        dtype="float32",
        prompt_length=64,
        response_length=LENGTH,
        max_num_seqs=16,
        engine_kwargs={"ulysses_infer": SETTINGS},
    )
    model = HFModelConfig(path=folder)
    replica = get_rollout_replica_class("ulysses_infer")(
        replica_rank=0, config=config, model_config=model, gpus_per_node=tensor_parallel * data_parallel
    )
    await replica.init_standalone()
    server = replica.server_handle
    url = "http://{}:{}".format(*await server.get_server_address.remote())

    def generate(request_id: str, first: int = 6, **params: Any) -> Any:
        given = {"temperature": 0.0, "logprobs": True, **params}
        return server.generate.remote([5, first, 7], given, request_id)

    found: dict[str, Any] = {"classes": [type(replica).__name__, get_rollout_class("ulysses_infer").__name__]}
    found["num_workers"] = len(replica.workers)
    found["first"] = (await generate("a", max_tokens=8)).model_dump()
    await send_from_all(replica, folder, 1.0, 1)  # the next one takes less time
    running = [generate(f"r{number}", number, ignore_eos=True, max_tokens=LENGTH) for number in range(NUM_RUNNING)]
    await wait_for_first_tokens(url, 1 + NUM_RUNNING)
    for steps in (3, 4):
        found["adapter"] = await send_from_all(replica, folder, 1.0, steps)
    found["updated"] = [each.model_dump() for each in await asyncio.gather(*running)]
    running = [generate(f"s{number}", number, ignore_eos=True, max_tokens=LENGTH) for number in range(NUM_RUNNING)]
    await wait_for_first_tokens(url, 1 + 2 * NUM_RUNNING)
    found["abort"] = await replica.abort_all_requests()
    found["aborted"] = [each.model_dump() for each in await asyncio.gather(*running)]
    held = generate("b", max_tokens=8)
    await replica.release_kv_cache()
    await send_from_all(replica, folder, 0.5, 5)
    await replica.resume_kv_cache()
    found["held"] = not ray.wait([held], timeout=1.0)[0]
    await replica.resume_generation()
    found["last"] = (await held).model_dump()
    await replica.abort_all_requests(reject_request=True)
    found["rejected"] = (await generate("c")).model_dump()
    await replica.resume_generation()
    found["modes"] = await modes(url)
    try:
        await server.generate.remote([5], {"max_tokens": 2}, "d", image_data=["picture"])
    except ray.exceptions.RayTaskError as error:
        found["refused"] = str(error.cause)
    return found


def main(folder: str, tensor_parallel: str, data_parallel: str) -> None:
    sizes = int(tensor_parallel), int(data_parallel)
    ray.init(address="local", num_cpus=8, num_gpus=math.prod(sizes), include_dashboard=False)
    try:
        print(json.dumps(asyncio.run(run(os.path.abspath(folder), *sizes))))
    finally:
        ray.shutdown()


if __name__ == "__main__":
    main(*sys.argv[1:])
