"""OpenRLHF's engines: an actor with the methods of its `RolloutRayActor`, and the function that makes them (0.11).

OpenRLHF has no registry of engines: a script of one's own gives `create_vllm_engines` of this module to OpenRLHF's
training (docs/training.md).
"""

from __future__ import annotations

import asyncio
import functools
import importlib.util
import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import AutoTokenizer

from ulysses_infer.config import load_config
from ulysses_infer.errors import ConfigError, RequestError
from ulysses_infer.outputs import RequestOutput
from ulysses_infer.rl.engine_server import EngineServer, plain_params
from ulysses_infer.rl.openrlhf_seats import Seat, Seats
from ulysses_infer.rl.openrlhf_weights import BroadcastWeights, CollectiveWeights, CudaHandles

CACHE_TAG = "kv_cache"
SHARED_GPU = 0.2
"""Of a GPU, for Ray: what OpenRLHF's own engines take beside the training."""


class VersionedOutput(RequestOutput):
    """A finished request. weight_versions: of the weights that computed it; "0" before the first update."""

    weight_versions: list[str]


class RolloutRayActor:
    """One engine with the methods of OpenRLHF's `RolloutRayActor`; make it with `create_vllm_engines`.

    agent_func_path, remote_rm_url: what is done with a prompt, by OpenRLHF's own executors. mm_pad_token_ids: without
    effect. settings: further keys of the recipe. seats: actors of `Seat` for the ranks after the first. kwargs: vLLM's
    arguments as OpenRLHF gives them. Raises `ConfigError`.
    """

    def __init__(
        self,
        *args: Any,
        bundle_indices: list[int] | None = None,
        agent_func_path: str | None = None,
        remote_rm_url: str | None = None,
        mm_pad_token_ids: set[int] | None = None,
        settings: Mapping[str, Any] | None = None,
        seats: Sequence[Any] = (),
        **kwargs: Any,
    ) -> None:
        self._agent_func_path, self._remote_rm_url = agent_func_path, remote_rm_url
        self._tokenizer = AutoTokenizer.from_pretrained(kwargs["model"])
        self._server = EngineServer({**settings_of(kwargs), **(settings or {})})
        self._seats = Seats(seats)
        self._weights: BroadcastWeights | CollectiveWeights | None = None
        self._handles = CudaHandles(self._server)
        self._num_running = 0

    @functools.cached_property
    def executor(self) -> Any:
        """OpenRLHF's: what is done with a prompt."""
        return _executor(self._agent_func_path, self._remote_rm_url)

    async def start(self) -> None:
        """Start the engine, before all else. Raises `EngineDeadError` if it ends at once, and `ConfigError` if its GPUs
        are on several nodes."""
        await self._server.start(await self._seats.devices())

    # -- requests ----------------------------------------------------------------------------------------------

    async def generate(
        self, prompt_token_ids: list[int], sampling_params: Any, multi_modal_data: Any = None
    ) -> VersionedOutput:
        """Complete token ids. sampling_params: vLLM's, or an object with the same fields.

        Raises `RequestError` for images and wrong parameters.
        """
        if multi_modal_data:
            raise RequestError("images are given; only text prompts are served")
        params = plain_params(sampling_params)
        self._num_running += 1
        try:
            completion, versions = await self._server.generate(list(prompt_token_ids), params)
        finally:
            self._num_running -= 1
        text = self._tokenizer.decode(completion.token_ids, skip_special_tokens=params.skip_special_tokens)
        completion.text = str(text)
        output = VersionedOutput("", None, list(prompt_token_ids), [completion], True)
        output.weight_versions = versions
        return output

    async def generate_responses(
        self,
        prompt: str,
        label: str,
        sampling_params: Any,
        max_length: int,
        hf_tokenizer: Any,
        num_samples: int = 1,
        images: Any = None,
    ) -> list[Any]:
        """What the executor makes of a prompt, `num_samples` times, at the same time."""
        common = {"prompt": prompt, "label": label, "sampling_params": sampling_params, "max_length": max_length}
        samples = (
            self.executor.execute(**common, hf_tokenizer=hf_tokenizer, llm_engine=self, images=images)
            for _ in range(num_samples)
        )
        return await asyncio.gather(*samples)

    def get_num_unfinished_requests(self) -> int:
        """The number of requests that run or wait."""
        return self._num_running

    async def pause_generation(self) -> None:
        """Stop running steps; requests are kept, and computed again with the weights of then."""
        await self._server.close("pause")

    async def resume_generation(self) -> None:
        """Go on."""
        await self._server.open("pause")

    async def reset_prefix_cache(self) -> None:
        """Drop cached prefixes, unless requests run; an update of the weights drops them anyway."""
        if not self._num_running:
            await self._server.call("/reset_prefix_cache")

    # -- weights and memory ------------------------------------------------------------------------------------

    async def init_process_group(
        self,
        master_address: str,
        master_port: int,
        rank_offset: int,
        world_size: int,
        group_name: str,
        backend: str,
        use_ray: bool,
    ) -> None:
        """Join the trainer's group, in which it is rank 0.

        use_ray: this actor and its seats join `ray.util.collective`'s group, as the tensor-parallel ranks of this
        engine. Otherwise every rank of the engine joins, and the trainer's end is
        `openrlhf_weights.stateless_init_process_group`. Raises `RequestError`.
        """
        if use_ray:
            self._weights = CollectiveWeights(self._server, self._seats, group_name, backend)
            await self._weights.join(world_size, rank_offset)
        else:
            self._weights = BroadcastWeights(self._server)
            await self._weights.join(master_address, master_port, rank_offset, world_size)

    async def update_weight(self, name: str, dtype: torch.dtype, shape: Any, empty_cache: bool = False) -> None:
        """Receive one tensor that the trainer broadcasts. empty_cache: it is the last, and the weights are served."""
        if self._weights is None:
            raise RequestError("there is no group with the trainer; call init_process_group first")
        await self._weights.receive(name, dtype, tuple(shape), empty_cache)

    async def update_weight_cuda_ipc(
        self, name: str, dtype: torch.dtype, shape: Any, ipc_handles: Mapping[str, Any], empty_cache: bool = False
    ) -> None:
        """Take one tensor from the memory of this GPU. ipc_handles: by GPU. empty_cache: as of `update_weight`."""
        await self._handles.receive(name, ipc_handles, empty_cache)

    async def sleep(self, level: int = 1) -> None:
        """Free the memory of the cache, with level 2 also of the weights, once running requests have ended."""
        await self._server.sleep(level)

    async def wake_up(self, tags: list[str] | None = None) -> None:
        """Take the memory of the cache; that of the weights is there, or comes with an update."""
        if tags is None or CACHE_TAG in tags:
            await self._server.wake_up()

    def shutdown(self) -> None:
        """End the engine; it ends with the actor in any case."""
        self._server.stop()


def settings_of(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe of an engine, from vLLM's arguments as OpenRLHF gives them. Raises `ConfigError`."""
    if kwargs.get("limit_mm_per_prompt"):
        raise ConfigError("max_images_per_prompt is given; only text prompts are served")
    names = {
        "model": "model.path",
        "dtype": "model.dtype",
        "max_model_len": "model.max_model_len",
        "trust_remote_code": "model.trust_remote_code",
        "tensor_parallel_size": "parallel.tp",
        "gpu_memory_utilization": "cache.memory_utilization",
        "enable_prefix_caching": "cache.enable_prefix_caching",
        "enforce_eager": "runtime.enforce_eager",
        "logprobs_mode": "runtime.logprobs_mode",
    }
    return {names[name]: value for name, value in kwargs.items() if name in names and value is not None}


def create_vllm_engines(
    num_engines: int,
    tensor_parallel_size: int,
    pretrain: str,
    seed: int,
    full_determinism: bool,
    enable_prefix_caching: bool,
    enforce_eager: bool,
    max_model_len: int,
    shared_pg: Any = None,
    gpu_memory_utilization: float | None = None,
    vllm_enable_sleep: bool = False,
    logprobs_mode: str | None = None,
    agent_func_path: str | None = None,
    remote_rm_url: str | None = None,
    max_images_per_prompt: int = 0,
    settings: Mapping[str, Any] | None = None,
    gpus_per_engine: float | None = None,
) -> list[Any]:
    """Engines as Ray actors, with the arguments of OpenRLHF's function of this name.

    settings: further keys of the recipe. gpus_per_engine: by default one per rank, or a share of one per rank if the
    training's placement group is given; 0 on CPUs. In that group, which has one GPU per bundle, engines take one bundle
    per rank, in order. Raises `ConfigError` for wrong settings.
    """
    import ray

    arguments = {
        "model": pretrain,
        "dtype": "bfloat16",
        "trust_remote_code": True,
        "max_model_len": max_model_len,
        "tensor_parallel_size": tensor_parallel_size,
        "enable_prefix_caching": enable_prefix_caching,
        "enforce_eager": enforce_eager,
        "gpu_memory_utilization": gpu_memory_utilization,
        "logprobs_mode": logprobs_mode,
        "limit_mm_per_prompt": {"image": max_images_per_prompt} if max_images_per_prompt else None,
        "agent_func_path": agent_func_path,
        "remote_rm_url": remote_rm_url,
        "settings": settings,
    }
    num_ranks = load_config(None, {**settings_of(arguments), **(settings or {})}).parallel.world_size
    is_shared = shared_pg is not None
    total = num_ranks * (SHARED_GPU if is_shared else 1.0) if gpus_per_engine is None else gpus_per_engine
    group = shared_pg if is_shared else _engine_group(num_engines, total)
    places = _places(group, num_engines, num_ranks, is_shared)
    engines = [_make_engine(group, bundles, total / num_ranks, arguments) for bundles in places]
    ray.get([engine.start.remote() for engine in engines])
    if vllm_enable_sleep:
        ray.get([engine.sleep.remote() for engine in engines])
    return engines


def _engine_group(num_engines: int, num_gpus: float) -> Any:
    """A placement group with a bundle, and so one node, for each engine."""
    import ray

    bundle = {"CPU": 1.0, **({"GPU": num_gpus} if num_gpus else {})}
    group = ray.util.placement_group([dict(bundle) for _ in range(num_engines)], strategy="PACK")
    ray.get(group.ready())
    return group


def _places(group: Any, num_engines: int, num_ranks: int, is_shared: bool) -> list[list[int]]:
    """The bundles of the ranks of each engine: those of the training's group, of which neighbours share a node."""
    import ray

    if not is_shared:
        return [[engine] * num_ranks for engine in range(num_engines)]
    nodes: dict[str, list[int]] = {}
    for bundle, node in ray.util.placement_group_table(group)["bundles_to_node_id"].items():
        nodes.setdefault(node, []).append(bundle)
    ordered = [bundle for bundles in nodes.values() for bundle in bundles]
    if len(ordered) < num_engines * num_ranks:
        raise ConfigError(
            f"{num_engines} engines of {num_ranks} ranks need {num_engines * num_ranks} GPUs, and the training's group "
            f"has {len(ordered)}; use fewer engines or ranks"
        )
    return [ordered[engine * num_ranks :][:num_ranks] for engine in range(num_engines)]


def _make_engine(group: Any, bundles: list[int], num_gpus: float, arguments: Mapping[str, Any]) -> Any:
    """An engine actor and its seats. bundles: of its ranks; num_gpus: of each."""
    import ray
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    def actor(kind: type, bundle: int, num_cpus: float) -> Any:
        strategy = PlacementGroupSchedulingStrategy(
            group, placement_group_capture_child_tasks=True, placement_group_bundle_index=bundle
        )
        return ray.remote(kind).options(num_cpus=num_cpus, num_gpus=num_gpus, scheduling_strategy=strategy)

    seats = [actor(Seat, bundle, 0).remote() for bundle in bundles[1:]]
    return actor(RolloutRayActor, bundles[0], min(1.0, num_gpus or 1.0)).remote(**arguments, seats=seats)


def _executor(agent_func_path: str | None, remote_rm_url: str | None) -> Any:
    """OpenRLHF's executor, or that of a Python file. Raises `ConfigError`."""
    from openrlhf.utils.agent import AgentExecutorBase, SingleTurnAgentExecutor

    if agent_func_path is None:
        return SingleTurnAgentExecutor(remote_rm_url)
    spec = importlib.util.spec_from_file_location("agent_module", agent_func_path)
    if spec is None or spec.loader is None or not os.path.isfile(agent_func_path):
        raise ConfigError(f"agent_func_path is {agent_func_path!r}; give an existing Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found = getattr(module, "AgentExecutor", None)
    if not (isinstance(found, type) and issubclass(found, AgentExecutorBase)):
        raise ConfigError(f"{agent_func_path} has no class AgentExecutor derived from OpenRLHF's AgentExecutorBase")
    return found()
