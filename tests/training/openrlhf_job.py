"""A program with Ray: two engines of two tensor-parallel ranks on CPUs, and a trainer that broadcasts new weights.

The trainer does what OpenRLHF's does with `--vllm.sync_with_ray`. Prints what the test checks as one line of JSON.
Argument: the model's folder.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

import psutil
import ray
import torch
from ray.util import collective
from transformers import AutoModelForCausalLM

from ulysses_infer.rl.openrlhf import create_vllm_engines

NUM_ENGINES, TENSOR_PARALLEL = 2, 2
PROMPT = [5, 6, 7]
GROUP = "openrlhf"
SETTINGS = {
    "runtime.device": "cpu",
    "runtime.threads_per_rank": 1,
    "cache.num_blocks": 128,
    "model.dtype": "float32",
    "server.heartbeat_timeout": 60,
}


def make_engines(folder: str) -> list[Any]:
    """One engine in a group of the training's, as with `--train.colocate_all`, and one in a group of its own."""
    shared = ray.util.placement_group([{"CPU": 1, "GPU": 1}] * TENSOR_PARALLEL, strategy="PACK")
    ray.get(shared.ready())
    return [make_engine(folder, shared), make_engine(folder, None)]


def make_engine(folder: str, shared: Any) -> Any:
    (engine,) = create_vllm_engines(
        num_engines=1,
        tensor_parallel_size=TENSOR_PARALLEL,
        pretrain=folder,
        seed=0,
        full_determinism=False,
        enable_prefix_caching=True,
        enforce_eager=False,
        max_model_len=256,
        logprobs_mode="processed_logprobs",
        settings=SETTINGS,
        shared_pg=shared,
    )
    return engine


class Trainer:
    """Rank 0 of the group; a Ray actor, as OpenRLHF's."""

    def __init__(self, engines: list[Any], folder: str) -> None:
        self._engines = engines
        self._model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)

    def join(self) -> None:
        """The group of this process and all tensor-parallel ranks."""
        world_size = NUM_ENGINES * TENSOR_PARALLEL + 1
        joins = [
            engine.init_process_group.remote(
                "127.0.0.1", 0, 1 + index * TENSOR_PARALLEL, world_size, GROUP, backend="gloo", use_ray=True
            )
            for index, engine in enumerate(self._engines)
        ]
        collective.init_collective_group(world_size, 0, "gloo", GROUP)
        ray.get(joins)

    def send(self, scale: float) -> None:
        """All weights, times `scale`."""
        named = list(self._model.named_parameters())
        for index, (name, tensor) in enumerate(named, start=1):
            updates = [
                engine.update_weight.remote(name, tensor.dtype, tensor.shape, empty_cache=index == len(named))
                for engine in self._engines
            ]
            collective.broadcast(tensor.data * scale, 0, GROUP)
            ray.get(updates)


def generate(engines: list[Any]) -> list[Any]:
    params = {"temperature": 0.0, "max_tokens": 8, "logprobs": 1, "ignore_eos": True}
    outputs = ray.get([engine.generate.remote(PROMPT, params) for engine in engines])
    return [_plain(output) for output in outputs]


def _plain(output: Any) -> tuple[list[int], list[float], list[str]]:
    (found,) = output.outputs
    scores = [row[token].logprob for token, row in zip(found.token_ids, found.logprobs, strict=True)]
    return found.token_ids, scores, output.weight_versions


def devices_of(actor: Any) -> list[str]:
    """The GPUs that the processes of an engine see, which on this machine exist for Ray only."""
    variables = psutil.Process(actor._server._process.pid).environ()
    return variables["CUDA_VISIBLE_DEVICES"].split(",")


def main(folder: str) -> None:
    ray.init(address="local", num_cpus=6, num_gpus=NUM_ENGINES * TENSOR_PARALLEL, include_dashboard=False)
    try:
        engines = make_engines(os.path.abspath(folder))
        devices = ray.get([engine.__ray_call__.remote(devices_of) for engine in engines])
        trainer = ray.remote(Trainer).remote(engines, os.path.abspath(folder))
        ray.get(trainer.join.remote())
        outputs = [generate(engines)]
        ray.get(trainer.send.remote(0.8))
        outputs.append(generate(engines))
        print(json.dumps({"devices": devices, "outputs": outputs}))
    finally:
        ray.shutdown()


if __name__ == "__main__":
    main(sys.argv[1])
