"""verl's rollouts: the name `ulysses_infer` in verl's registries, the rollout of a training worker, and the replica.

`VERL_USE_EXTERNAL_MODULES=ulysses_infer.rl.verl` has verl import this module on every process, and
`actor_rollout_ref.rollout.name=ulysses_infer` chooses it (verl 0.9).
"""

from __future__ import annotations

import asyncio
import os
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from verl.utils.device import get_resource_name, get_visible_devices_keyword
from verl.workers.rollout import base
from verl.workers.rollout.base import BaseRollout
from verl.workers.rollout.replica import RolloutReplica, RolloutReplicaRegistry
from verl.workers.rollout.utils import ensure_async_iterator

from ulysses_infer.errors import ConfigError, RequestError
from ulysses_infer.rl.weight_folder import WeightFolder

NAME = "ulysses_infer"
FULL_TENSORS = "named_tensors"


class UlyssesRollout(BaseRollout):
    """The rollout engine as one worker of verl sees it. The first worker of a replica speaks for all of them.

    config, model_config, device_mesh, replica_rank: as of verl's `ServerAdapter`s.
    """

    def __init__(self, config: Any, model_config: Any, device_mesh: Any, replica_rank: int = -1) -> None:
        super().__init__(config, model_config, device_mesh)
        size = self.config.tensor_model_parallel_size * self.config.data_parallel_size
        replica, self.rollout_rank = divmod(int(os.environ["RANK"]), size)
        self.replica_rank = replica if replica_rank == -1 else replica_rank
        self._server: Any = None

    @property
    def is_leader_rank(self) -> bool:
        """Whether this worker speaks for the replica."""
        return self.rollout_rank == 0

    async def resume(self, tags: list[str]) -> None:
        """Take memory again: weights, kv_cache. That of the weights comes with the next update."""
        if self._can_sleep():
            await self._handle().wake_up.remote(tags=tags)

    async def release(self) -> None:
        """Free the memory of weights and cache."""
        if self._can_sleep():
            await self._handle().sleep.remote()

    async def update_weights(
        self, weights: Any, wire_format: str = FULL_TENSORS, global_steps: int | None = None, **kwargs: Any
    ) -> None:
        """Serve new weights; requests that run are kept, and their outputs have the steps of all weights.

        weights: (name, whole tensor) of all weights; every worker of the replica iterates, because reading them may be
        collective. global_steps: the version of the weights. Raises `RequestError` for parts of weights and adapters.
        """
        if wire_format != FULL_TENSORS:
            raise RequestError(f"wire_format is {wire_format!r}; use {FULL_TENSORS} (checkpoint_engine.backend)")
        if kwargs.get("peft_config") is not None:
            raise RequestError("the weights are those of a LoRA adapter; merge them with model.lora.merge=True")
        with WeightFolder(self.config.checkpoint_engine.update_weights_bucket_megabytes << 20) as folder:
            async for name, tensor in ensure_async_iterator(weights):
                if self.is_leader_rank:
                    folder.add(name, tensor)
            if self.is_leader_rank:
                await self._handle().load_weights.remote(folder.finish(), global_steps)

    def _can_sleep(self) -> bool:
        return self.is_leader_rank and self.config.free_cache_engine

    def _handle(self) -> Any:
        """The server's actor, which starts after this worker."""
        if self._server is None:
            self._server = ray.get_actor(f"{NAME}_server_{self.replica_rank}_0")
        return self._server


class UlyssesReplica(RolloutReplica):
    """One engine on the GPUs of its workers, which are on one node. Arguments are those of verl's `RolloutReplica`."""

    async def launch_servers(self) -> None:
        """Start the server's actor beside the workers. Raises `ConfigError` if they are on several nodes."""
        from ulysses_infer.rl.verl_server import UlyssesServer  # which imports verl, which imports this module

        places = await asyncio.gather(*(worker.__ray_call__.remote(_place) for worker in self.workers))
        nodes = sorted({node for node, _ in places})
        if len(nodes) > 1:
            raise ConfigError(
                f"a replica of {self.world_size} workers spans {len(nodes)} nodes; use a tensor_model_parallel_size "
                "and data_parallel_size whose product fits on one node"
            )
        devices = ",".join(device for _, found in places for device in found)
        server = (
            ray.remote(UlyssesServer)
            .options(
                scheduling_strategy=NodeAffinitySchedulingStrategy(nodes[0], soft=False),
                name=self._server_name(),
                max_concurrency=self.max_concurrency,
                num_cpus=0,
            )
            .remote(
                self.config,
                self.model_config,
                self.rollout_mode,
                self.replica_rank,
                {get_visible_devices_keyword(): devices} if devices else {},
            )
        )
        self.servers, self._server_handle = [server], server
        host, port = await server.launch_server.remote()
        self._server_address = f"{host}:{port}"

    async def abort_all_requests(self, reject_request: bool = False) -> dict[str, Any]:
        """End all requests with what they have, and hold (or fail) those that come until `resume_generation`."""
        found: dict[str, Any] = await self.server_handle.abort_all_requests.remote(reject_request=reject_request)
        return found

    async def abort_request(self, request_id: str) -> dict[str, Any]:
        """End one request with what it has."""
        found: dict[str, Any] = await self.server_handle.abort_request.remote(request_id)
        return found

    def _server_name(self) -> str:
        kind = "reward_" if self.is_reward_model else "teacher_" if self.is_teacher_model else ""
        return f"{NAME}_server_{kind}{self.replica_rank}_0{self.name_suffix}"


def _place(worker: Any) -> tuple[str, list[str]]:
    """The node of a worker, and its devices."""
    context = ray.get_runtime_context()
    return context.get_node_id(), list(context.get_accelerator_ids().get(get_resource_name(), ()))


def register() -> None:
    """Make verl know the name. verl has no function for rollouts, only for replicas."""
    RolloutReplicaRegistry.register(NAME, lambda: UlyssesReplica)
    base._ROLLOUT_REGISTRY[NAME, "async"] = f"{UlyssesRollout.__module__}.{UlyssesRollout.__name__}"


register()
