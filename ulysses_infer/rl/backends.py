"""The engine of a trainer's rollouts: on the processes of the training, or a running server that all of them share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch.distributed as dist

from ulysses_infer.errors import ConfigError
from ulysses_infer.inference import init_inference
from ulysses_infer.model.loading.sources import open_weights
from ulysses_infer.outputs import CompletionOutput
from ulysses_infer.rl.remote import RemoteEngine
from ulysses_infer.sampling_params import SamplingParams

Prompts = list[list[int]]


class RolloutBackend(Protocol):
    """Where completions come from. All processes of the training call its methods alike."""

    def sync_weights(self) -> None:
        """Serve the trainer's weights."""

    def complete(self, prompts: Prompts, params: Sequence[SamplingParams]) -> list[CompletionOutput]:
        """One completion of each prompt. All processes give the same prompts and get the same completions."""

    def shutdown(self) -> None:
        """Free memory; the training goes on."""


class ColocatedEngine:
    """One engine over the processes of the training. model: as accelerate has prepared it. sleeps: free the memory of
    cache and weights after each call. settings: as of `init_inference`."""

    def __init__(self, model: Any, accelerator: Any, sleeps: bool, config: Any, settings: dict[str, Any]) -> None:
        self._model, self._accelerator, self._sleeps = model, accelerator, sleeps
        self._lacks_weights = False
        self.engine = init_inference(trained_model(model, accelerator), config, **settings)

    def sync_weights(self) -> None:
        """See `RolloutBackend.sync_weights`."""
        self.engine.update_weights(trained_model(self._model, self._accelerator))
        self._lacks_weights = False

    def complete(self, prompts: Prompts, params: Sequence[SamplingParams]) -> list[CompletionOutput]:
        """See `RolloutBackend.complete`."""
        if self._lacks_weights:
            self.sync_weights()
        self.engine.wake_up()
        outputs = [output.outputs[0] for output in self.engine.generate(prompts, params)]
        if self._sleeps:
            self.engine.sleep(2)
            self._lacks_weights = True
        return outputs

    def shutdown(self) -> None:
        """See `RolloutBackend.shutdown`."""
        self.engine.shutdown()


class SharedServer:
    """A running server, to which the main process talks. remote: None on the other processes."""

    def __init__(self, model: Any, accelerator: Any, remote: RemoteEngine | None) -> None:
        self._model, self._accelerator, self._remote = model, accelerator, remote

    def sync_weights(self) -> None:
        """See `RolloutBackend.sync_weights`."""
        source = open_weights(trained_model(self._model, self._accelerator))
        weights = [(key, source.read(key, None)) for key in list(source.keys())]  # collective with ZeRO 3
        # Rank-divergent: only the main process sends.
        if self._remote is not None:
            self._remote.send(weights)
        self._accelerator.wait_for_everyone()

    def complete(self, prompts: Prompts, params: Sequence[SamplingParams]) -> list[CompletionOutput]:
        """See `RolloutBackend.complete`."""
        # Rank-divergent: only the main process sends requests.
        outputs = [] if self._remote is None else self._remote.generate(prompts, params)
        if self._accelerator.num_processes == 1:
            return outputs
        shared: list[Any] = [outputs]
        dist.broadcast_object_list(shared, src=0)
        found: list[CompletionOutput] = shared[0]
        return found

    def shutdown(self) -> None:
        """See `RolloutBackend.shutdown`. The server stays."""


def trained_model(model: Any, accelerator: Any) -> Any:
    """The model as the engine takes it: DeepSpeed's engine, else the module itself. Raises `ConfigError`."""
    from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel

    inner = accelerator.unwrap_model(model, keep_torch_compile=False)
    if isinstance(model, FullyShardedDataParallel) or isinstance(inner, FSDPModule | FullyShardedDataParallel):
        raise ConfigError("the model is sharded by FSDP, which is not supported; shard it with DeepSpeed's ZeRO")
    return model if hasattr(model, "seq_parallel_group") else inner
