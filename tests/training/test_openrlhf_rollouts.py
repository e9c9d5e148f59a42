"""The engine actor of OpenRLHF, which here is a plain object: Ray only calls its methods."""

from __future__ import annotations

import asyncio
import importlib.metadata
import inspect
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.training.library_rollouts import (
    DEMO,
    check_greedy,
    demo_model,
    on_a_ray_cluster,
    on_one_and_two_ranks,
    run_job,
)
from tests.training.rollout_server import wait_for_first_tokens
from tests.training.signatures import methods, parameters_of_function
from ulysses_infer.errors import ConfigError, RequestError
from ulysses_infer.job.processes import free_port
from ulysses_infer.model.loading.sources import open_weights
from ulysses_infer.rl import openrlhf
from ulysses_infer.rl.openrlhf import RolloutRayActor, create_vllm_engines, settings_of
from ulysses_infer.rl.openrlhf_seats import Seats
from ulysses_infer.rl.openrlhf_weights import (
    BroadcastWeights,
    CollectiveWeights,
    opened,
    stateless_init_process_group,
)
from ulysses_infer.rl.weight_folder import WeightFolder

CPU = {
    "runtime.device": "cpu",
    "runtime.threads_per_rank": 1,
    "cache.num_blocks": 512,
}
PROMPT, LENGTH, NUM_RUNNING = [5, 6, 7], 300, 4
ENGINE = "openrlhf.trainer.ray.vllm_engine"


def is_installed(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


needs_ray = pytest.mark.skipif(not is_installed("ray"), reason="ray: not installed")
needs_openrlhf = pytest.mark.skipif(not is_installed("openrlhf"), reason="openrlhf: not installed")


@needs_openrlhf
def test_methods_have_the_parameters_of_openrlhfs_own() -> None:
    theirs = {name: found for name, found in methods(ENGINE, "RolloutRayActor").items() if not name.startswith("_")}
    for name, found in theirs.items():
        assert list(inspect.signature(getattr(RolloutRayActor, name)).parameters) == found, name
    own = list(inspect.signature(create_vllm_engines).parameters)
    expected = parameters_of_function(ENGINE, "create_vllm_engines")
    assert own[: len(expected)] == expected
    group = parameters_of_function("openrlhf.utils.distributed_util", "stateless_init_process_group")
    assert list(inspect.signature(stateless_init_process_group).parameters) == group


def test_a_folder_of_weights_holds_what_was_added(tmp_path: Path) -> None:
    reused = torch.empty(64)
    with WeightFolder(shard_bytes=600) as folder:
        for number in range(5):
            reused.fill_(number)
            folder.add(f"layer.{number}", reused.view(8, 8).T)
        opened_folder = open_weights(folder.finish())
        assert len(list(folder.path.glob("*.safetensors"))) == 2
        for number in range(5):
            assert torch.equal(opened_folder.read(f"layer.{number}", None), torch.full((8, 8), float(number)))
    assert not folder.path.exists()


def test_a_shared_tensor_is_that_of_the_own_gpu() -> None:
    def rebuild(*arguments: Any) -> torch.Tensor:
        return torch.tensor(arguments)

    handles = {"GPU-a": (rebuild, range(8)), "GPU-b": (rebuild, range(10, 18))}
    assert opened(handles, "GPU-b").tolist() == [10, 11, 12, 13, 14, 15, 0, 17]
    with pytest.raises(RequestError, match="no tensor is shared on GPU GPU-c, only on GPU-a, GPU-b"):
        opened(handles, "GPU-c")


def test_vllms_arguments_become_a_recipe() -> None:
    given = {"model": "m", "tensor_parallel_size": 2, "gpu_memory_utilization": None, "seed": 3, "enforce_eager": True}
    assert settings_of(given) == {"model.path": "m", "parallel.tp": 2, "runtime.enforce_eager": True}


def actor_of(folder: str, **settings: Any) -> RolloutRayActor:
    arguments = {"dtype": "float32", "max_model_len": 512, "logprobs_mode": "processed_logprobs"}
    return RolloutRayActor(model=folder, **arguments, settings={**CPU, **settings})


def test_wrong_use_is_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="max_images_per_prompt is given; only text prompts are served"):
        settings_of({"model": "m", "limit_mm_per_prompt": {"image": 1}})
    server = SimpleNamespace(config=SimpleNamespace(parallel=SimpleNamespace(tp=2, world_size=2)))
    with pytest.raises(RequestError, match="the other ranks have no seats; make the engines with create_vllm_engines"):
        asyncio.run(CollectiveWeights(server, Seats([]), "group", "gloo").join(3, 1))
    with pytest.raises(RequestError, match="a group of 2 has no room for 2 ranks from number 1 on"):
        asyncio.run(BroadcastWeights(server).join("127.0.0.1", 1, 1, 2))
    actor = actor_of(DEMO)
    with pytest.raises(RequestError, match="there is no group with the trainer; call init_process_group first"):
        asyncio.run(actor.update_weight("a", torch.float32, (2,)))
    with pytest.raises(RequestError, match="only text prompts are served"):
        asyncio.run(actor.generate(PROMPT, {"max_tokens": 2}, {"image": ["picture"]}))
    with pytest.raises(RequestError, match=r"sampling parameters: .*beam_width"):
        asyncio.run(actor.generate(PROMPT, {"beam_width": 2}))
    if is_installed("openrlhf"):
        with pytest.raises(ConfigError, match="give an existing Python file"):
            openrlhf._executor(str(tmp_path / "none.py"), None)
        (tmp_path / "agent.py").write_text("class AgentExecutor: pass")
        with pytest.raises(ConfigError, match="no class AgentExecutor derived from OpenRLHF's AgentExecutorBase"):
            openrlhf._executor(str(tmp_path / "agent.py"), None)


def greedy(length: int = 8) -> Any:
    """As vLLM's parameters, of which a trainer gives an object."""
    names = {"temperature": 0.0, "max_tokens": length, "logprobs": 1, "ignore_eos": True, "skip_special_tokens": False}
    return SimpleNamespace(**names, top_k=-1, detokenize=True, output_kind=2)


def check(model: Any, output: Any) -> None:
    """Greedy tokens of the model, with its log-probabilities."""
    (found,) = output.outputs
    assert found.finish_reason == "length"
    logprobs = [scores[token].logprob for token, scores in zip(found.token_ids, found.logprobs, strict=True)]
    check_greedy(model, output.prompt_token_ids, found.token_ids, logprobs)


async def update_by_broadcast(actor: RolloutRayActor, group: Any, model: Any) -> None:
    """As OpenRLHF's trainer: announce each tensor to the actor, then broadcast it."""
    named = list(model.named_parameters())
    for index, (name, tensor) in enumerate(named, start=1):
        told = asyncio.create_task(
            actor.update_weight(name, tensor.dtype, tensor.shape, empty_cache=index == len(named))
        )
        await asyncio.to_thread(group.broadcast, tensor.detach())
        await told


async def roll_out(models: list[Any], num_ranks: int) -> None:
    actor = actor_of(DEMO, **{"parallel.sp": num_ranks, "policy.threshold_tokens": 2})
    await actor.start()
    first = await actor.generate(PROMPT, greedy())
    check(models[0], first)
    assert first.weight_versions == ["0"]
    port, made = free_port(), []
    there = ("127.0.0.1", port, 0, 1 + num_ranks)
    trainer = threading.Thread(target=lambda: made.append(stateless_init_process_group(*there, "cpu")))
    trainer.start()
    await actor.init_process_group("127.0.0.1", port, 1, 1 + num_ranks, "openrlhf", backend="gloo", use_ray=False)
    trainer.join()
    running = [asyncio.create_task(actor.generate([5, number, 7], greedy(LENGTH))) for number in range(NUM_RUNNING)]
    await wait_for_first_tokens(f"http://127.0.0.1:{actor._server.port}", 1 + NUM_RUNNING)
    assert actor.get_num_unfinished_requests() == NUM_RUNNING
    await actor.pause_generation()
    await update_by_broadcast(actor, made[0], models[1])
    await actor.resume_generation()
    outputs = await asyncio.gather(*running)
    assert all(
        output.weight_versions == ["0", "1"] and len(output.outputs[0].token_ids) == LENGTH for output in outputs
    )
    second = await actor.generate(PROMPT, greedy())
    check(models[1], second)
    await actor.sleep(level=2)
    await update_by_broadcast(actor, made[0], models[0])
    waiting = asyncio.create_task(actor.generate(PROMPT, greedy()))
    await actor.wake_up(tags=["weights"])
    await asyncio.sleep(0.3)
    assert not waiting.done()
    await actor.wake_up(tags=["kv_cache"])
    third = await waiting
    check(models[0], third)
    assert third.weight_versions == ["2"]
    await actor.reset_prefix_cache()
    actor.shutdown()


@needs_ray
@on_one_and_two_ranks
def test_an_engine_generates_and_takes_weights_over_gloo(num_ranks: int) -> None:
    asyncio.run(roll_out([demo_model(), demo_model(0.8)], num_ranks))


@needs_ray
@on_a_ray_cluster
def test_engines_of_two_ranks_on_ray_take_the_weights_that_a_trainer_broadcasts() -> None:
    found = run_job("tests.training.openrlhf_job", DEMO)
    assert [len(devices) for devices in found["devices"]] == [2, 2]
    assert len({device for devices in found["devices"] for device in devices}) == 4
    for scale, version, outputs in zip([1.0, 0.8], ["0", "1"], found["outputs"], strict=True):
        model = demo_model(scale)
        for tokens, logprobs, versions in outputs:
            check_greedy(model, PROMPT, tokens, logprobs)
            assert versions == [version]
