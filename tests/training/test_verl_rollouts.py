"""The rollout and the replica of verl."""

from __future__ import annotations

import asyncio
import importlib.util
from types import SimpleNamespace
from typing import Any

import pytest

from tests.training.library_rollouts import (
    DEMO,
    check_greedy,
    demo_model,
    on_a_ray_cluster,
    on_one_and_two_ranks,
    run_job,
)
from tests.training.rollout_server import wait_for_first_tokens
from tests.training.signatures import methods
from ulysses_infer.errors import ConfigError, RequestError

MISSING = [name for name in ("verl", "ray") if importlib.util.find_spec(name) is None]
pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"{', '.join(MISSING)}: not installed")
CPU = {"runtime": {"device": "cpu", "threads_per_rank": 1}, "cache.num_blocks": 512, "server.heartbeat_timeout": 60}
CALLED = (
    *("generate", "abort_all_requests", "abort_request", "resume_generation", "wake_up", "sleep", "clear_kv_cache"),
    *("release_kv_cache", "resume_kv_cache", "start_profile", "stop_profile", "set_global_steps"),
    *("get_server_address", "get_rollout_config"),
)
"""What verl calls on the actor of a replica. The parameter `kv_transfer_params` is vLLM's own."""


def test_methods_have_the_parameters_of_verls_own() -> None:
    own = methods("ulysses_infer.rl.verl_server", "UlyssesServer")
    theirs = methods("verl.workers.rollout.vllm_rollout.vllm_async_server", "vLLMHttpServer")
    for name in CALLED:
        assert set(theirs[name]) - {"kv_transfer_params"} <= set(own[name]) | {"kwargs"}, name
    rollout = methods("ulysses_infer.rl.verl", "UlyssesRollout")
    abstract = methods("verl.workers.rollout.base", "BaseRollout")
    for name in ("resume", "update_weights", "release"):
        assert set(abstract[name]) <= set(rollout[name]), name
    replica = methods("ulysses_infer.rl.verl", "UlyssesReplica")
    theirs = methods("verl.workers.rollout.replica", "RolloutReplica")
    for name in set(replica) & set(theirs):
        assert replica[name] == theirs[name], name


def check(scale: float, prompt: list[int], output: dict[str, Any]) -> None:
    """Greedy tokens of weights times `scale`, and their log-probabilities."""
    check_greedy(demo_model(scale), prompt, output["token_ids"], output["log_probs"])


class Remote:
    """An object as Ray's handle of it: methods have `remote`."""

    def __init__(self, target: Any) -> None:
        self._target = target

    def __getattr__(self, name: str) -> Any:
        return SimpleNamespace(remote=getattr(self._target, name))


async def roll_out(monkeypatch: pytest.MonkeyPatch, num_ranks: int) -> None:
    """The classes of verl's registries in this process: the actor generates, the rollout updates."""
    from verl.workers.config import HFModelConfig, RolloutConfig
    from verl.workers.rollout.base import get_rollout_class
    from verl.workers.rollout.replica import RolloutMode, get_rollout_replica_class

    from ulysses_infer.rl import verl
    from ulysses_infer.rl.verl_server import UlyssesServer

    verl.register()  # if verl was imported without VERL_USE_EXTERNAL_MODULES
    sizes = {
        "data_parallel_size": num_ranks,
        "tensor_model_parallel_size": 1,
        "prompt_length": 64,
        "response_length": 300,
    }
    config = RolloutConfig(
        name="ulysses_infer", dtype="float32", max_num_seqs=16, engine_kwargs={"ulysses_infer": CPU}, **sizes
    )
    model = HFModelConfig(path=DEMO)
    replica = get_rollout_replica_class("ulysses_infer")(0, config, model, gpus_per_node=num_ranks)
    assert replica.world_size == num_ranks
    server = UlyssesServer(config, model, RolloutMode.HYBRID, 0, {})
    rollouts = []
    for rank in range(num_ranks):
        monkeypatch.setenv("RANK", str(rank))
        rollouts.append(get_rollout_class("ulysses_infer")(config, model, None))
        rollouts[rank]._server = Remote(server)
    assert [each.is_leader_rank for each in rollouts] == [True, False][:num_ranks]
    url = "http://{}:{}".format(*await server.launch_server())
    loaded = demo_model()

    def weights(scale: float) -> Any:
        return ((name, tensor * scale) for name, tensor in loaded.state_dict().items())

    async def update(scale: float, step: int) -> None:
        await asyncio.gather(*(each.update_weights(weights(scale), global_steps=step) for each in rollouts))

    async def on_all(method: str, *arguments: Any) -> None:
        await asyncio.gather(*(getattr(each, method)(*arguments) for each in rollouts))

    def generate(name: str, number: int, **params: Any) -> Any:
        given = {"temperature": 0.0, "logprobs": True, "top_k": -1, **params}
        return asyncio.create_task(server.generate([5, number, 7], given, name))

    check(1.0, [5, 6, 7], (await generate("a", 6, max_tokens=8)).model_dump())
    running = [generate(f"r{number}", number, ignore_eos=True) for number in range(4)]
    await wait_for_first_tokens(url, 5)
    await update(1.0, 3)
    outputs = await asyncio.gather(*running)
    assert {output.extra_fields["min_global_steps"] for output in outputs} == {0}
    assert {output.extra_fields["global_steps"] for output in outputs} == {3}
    for number, output in enumerate(outputs):
        check(1.0, [5, number, 7], output.model_dump())
    running = [generate(f"s{number}", number, ignore_eos=True) for number in range(4)]
    await wait_for_first_tokens(url, 9)
    assert await server.abort_request("s0") == {"aborted": True, "request_id": "s0"}
    await running[0]
    assert (await server.abort_all_requests())["aborted_count"] == 3
    for output in await asyncio.gather(*running):
        assert output.stop_reason == "aborted"
        assert len(output.token_ids) < 300
    held = generate("b", 6, max_tokens=8)
    await on_all("release")
    await on_all("resume", ["weights"])
    await update(0.5, 5)
    await on_all("resume", ["kv_cache"])
    await asyncio.sleep(0.5)
    assert not held.done()
    await server.resume_generation()
    last = await held
    assert (last.stop_reason, last.extra_fields["global_steps"]) == ("completed", 5)
    check(0.5, [5, 6, 7], last.model_dump())
    await server.abort_all_requests(reject_request=True)
    assert (await generate("c", 6)).stop_reason == "aborted"
    await server.resume_generation()
    for wrong, message in (({"wire_format": "delta_flush"}, "use named_tensors"), ({"peft_config": {}}, "merge them")):
        with pytest.raises(RequestError, match=message):
            await rollouts[0].update_weights(weights(1.0), **wrong)
    with pytest.raises(RequestError, match="only text prompts are served"):
        await server.generate([5], {}, "d", image_data=["picture"])
    with pytest.raises(RequestError, match="the prompt has 400 tokens, of a context of 364"):
        await server.generate([5] * 400, {}, "e")
    server.shutdown()


@on_one_and_two_ranks
def test_verls_classes_generate_and_take_weights_while_requests_run(
    monkeypatch: pytest.MonkeyPatch, num_ranks: int
) -> None:
    asyncio.run(roll_out(monkeypatch, num_ranks))


@on_a_ray_cluster
@pytest.mark.parametrize(("tensor_parallel", "data_parallel"), [(1, 1), (1, 2), (2, 1)])
def test_verls_registries_make_a_replica_that_generates_and_takes_weights(
    tensor_parallel: int, data_parallel: int
) -> None:
    sizes = (str(tensor_parallel), str(data_parallel))
    found = run_job("tests.training.verl_job", DEMO, *sizes, VERL_USE_EXTERNAL_MODULES="ulysses_infer.rl.verl")
    assert found["classes"] == ["UlyssesReplica", "UlyssesRollout"]
    assert found["adapter"] == "UlyssesRollout"
    assert found["num_workers"] == tensor_parallel * data_parallel
    assert found["first"]["stop_reason"] == "completed"
    check(1.0, [5, 6, 7], found["first"])
    steps = [
        (each["extra_fields"]["min_global_steps"], each["extra_fields"]["global_steps"]) for each in found["updated"]
    ]
    assert all(len(each["token_ids"]) == 400 for each in found["updated"])
    assert {step for pair in steps for step in pair} <= {1, 3, 4}
    assert any(first < last for first, last in steps)
    for number, output in enumerate(found["updated"]):
        check(1.0, [5, number, 7], output)
    assert found["abort"]["aborted_count"] == 4
    for number, output in enumerate(found["aborted"]):
        assert output["stop_reason"] == "aborted"
        assert len(output["token_ids"]) < 400
        check(1.0, [5, number, 7], output)
    assert found["held"]
    assert found["last"]["extra_fields"]["global_steps"] == 5
    check(0.5, [5, 6, 7], found["last"])
    assert found["rejected"]["stop_reason"] == "aborted"
    assert found["rejected"]["token_ids"] == []
    assert "only text prompts are served" in found["refused"]
    assert len(found["modes"]) == (2 if data_parallel == 2 else 1)


@pytest.mark.parametrize(
    ("config", "model", "message"),
    [
        ({"pipeline_model_parallel_size": 2}, {}, "pipeline_model_parallel_size is 2; use 1"),
        ({"quantization": "fp8"}, {}, "rollout.quantization is 'fp8'; serve a quantized model.path instead"),
        ({}, {"lora_rank": 8}, "LoRA of rank 8 is trained; set model.lora.merge=True"),
    ],
)
def test_what_is_not_supported_is_refused_in_one_line(config: Any, model: Any, message: str) -> None:
    from ulysses_infer.rl.verl_server import settings_of

    given = SimpleNamespace(**{"pipeline_model_parallel_size": 1, "quantization": None, **config})
    with pytest.raises(ConfigError, match=message):
        settings_of(given, SimpleNamespace(**{"lora_rank": 0, "lora": {}, **model}))
