"""The actor of a verl replica: generates tokens on a server that it starts, under the names that verl calls."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import ray
from verl.utils import normalize_token_ids
from verl.utils.config import omega_conf_to_dataclass
from verl.workers.rollout.replica import RolloutMode, TokenOutput

from ulysses_infer.errors import ConfigError, RequestError
from ulysses_infer.outputs import CompletionOutput
from ulysses_infer.rl.engine_server import FIRST_VERSION, EngineServer, plain_params
from ulysses_infer.sampling_params import SamplingParams

SETTINGS_KEY = "ulysses_infer"
CACHE_TAG = "kv_cache"
ABORTED, COMPLETED = "aborted", "completed"


class UlyssesServer:
    """The engine of one replica. Its tensor parallelism is `tensor_model_parallel_size`, its sequence parallelism
    `data_parallel_size`; each step chooses a mode.

    config: verl's `RolloutConfig`, whose `engine_kwargs.ulysses_infer` has further keys of the recipe; model_config:
    `HFModelConfig`; devices: the environment that selects the GPUs. Raises `ConfigError` for what is not supported.
    """

    def __init__(
        self, config: Any, model_config: Any, rollout_mode: RolloutMode, replica_rank: int, devices: Mapping[str, str]
    ) -> None:
        self.config = omega_conf_to_dataclass(config)
        self._mode, self._replica_rank = rollout_mode, replica_rank
        model = omega_conf_to_dataclass(model_config)
        self._server = EngineServer(settings_of(self.config, model), ray.util.get_node_ip_address())
        self._devices = devices
        self._running: set[str] = set()
        self._rejects = False
        self._step = int(FIRST_VERSION)

    async def launch_server(self) -> tuple[str, int]:
        """Start the engine; returns its address, where it also answers OpenAI's API."""
        await self._server.start(self._devices)
        return self.get_server_address()

    def get_server_address(self) -> tuple[str, int]:
        """Host and port."""
        return self._server.address, self._server.port

    def get_rollout_config(self) -> Any:
        """verl's `RolloutConfig`."""
        return self.config

    # -- requests ----------------------------------------------------------------------------------------------

    async def generate(
        self,
        prompt_ids: list[int],
        sampling_params: dict[str, Any],
        request_id: str,
        image_data: list[Any] | None = None,
        video_data: list[Any] | None = None,
        audio_data: list[Any] | None = None,
        mm_processor_kwargs: dict[str, Any] | None = None,
        priority: int = 0,
    ) -> TokenOutput:
        """Complete token ids. Of an aborted request, the tokens so far. `priority` has no effect.

        Raises `RequestError` for images, videos, audio, and prompts that leave no room.
        """
        if any((image_data, video_data, audio_data)):
            raise RequestError("images, videos or audio are given; only text prompts are served")
        if self._rejects:
            return TokenOutput(token_ids=[], stop_reason=ABORTED, extra_fields={"global_steps": self._step})
        prompt = normalize_token_ids(prompt_ids)
        params = self._params(sampling_params, len(prompt))
        self._running.add(request_id)
        try:
            output, versions = await self._server.generate(prompt, params, request_id)
        finally:
            self._running.discard(request_id)
        return self._token_output(output, versions)

    def _params(self, given: Mapping[str, Any], prompt_length: int) -> SamplingParams:
        """verl's parameters, with its defaults; the length is limited by the context."""
        fields = dict(given)
        context = self._server.config.model.max_model_len
        assert context is not None  # see settings_of
        room = context - prompt_length
        if room < 1:
            raise RequestError(f"the prompt has {prompt_length} tokens, of a context of {context}")
        budget = self.config.prompt_length + self.config.response_length - prompt_length
        usual = min(self.config.response_length, budget)
        wanted = fields.pop("max_tokens", fields.pop("max_new_tokens", usual))
        fields.setdefault("repetition_penalty", self.config.repetition_penalty)
        fields.setdefault("ignore_eos", self.config.ignore_eos)
        if self.config.full_determinism:
            fields.setdefault("seed", self._replica_rank + self.config.seed)
        logprobs = 0 if fields.pop("logprobs", False) else None
        return plain_params({**fields, "max_tokens": max(1, min(wanted, room)), "logprobs": logprobs})

    def _token_output(self, output: CompletionOutput, versions: list[str]) -> TokenOutput:
        """verl's output. Its global_steps are those of the latest weights; min_ and max_global_steps those of all."""
        steps = [int(version) for version in versions] or [self._step]
        scores = output.logprobs
        chosen = (
            None
            if scores is None
            else [row[token].logprob for token, row in zip(output.token_ids, scores, strict=True)]
        )
        finish = output.finish_reason
        reason = ABORTED if finish == "abort" else COMPLETED if finish in ("stop", "length") else finish
        extra = {"global_steps": steps[-1], "min_global_steps": steps[0], "max_global_steps": steps[-1]}
        return TokenOutput(token_ids=output.token_ids, log_probs=chosen, stop_reason=reason, extra_fields=extra)

    async def abort_all_requests(self, reset_prefix_cache: bool = True, reject_request: bool = False) -> dict[str, Any]:
        """End all requests with what they have; those that come are held until `resume_generation`.

        reject_request: they are ended instead. The prefix cache is always cleared.
        """
        self._rejects = reject_request
        running = sorted(self._running)
        await self._server.close("abort", "abort")
        return {"aborted_count": len(running), "request_ids": running}

    async def resume_generation(self) -> None:
        """Run those that were held, and new ones."""
        self._rejects = False
        await self._server.open("abort")

    async def abort_request(self, request_id: str, reset_prefix_cache: bool = True) -> dict[str, Any]:
        """End one request with what it has; others keep their prefixes."""
        aborted = request_id in self._running and await self._server.abort(request_id)
        return {"aborted": aborted, "request_id": request_id}

    # -- weights and memory ------------------------------------------------------------------------------------

    async def load_weights(self, folder: str, global_steps: int | None) -> None:
        """Serve the weights in a folder on this node; requests that run are kept."""
        await self._server.load_weights(folder, None if global_steps is None else str(global_steps))
        if global_steps is not None:
            self._step = global_steps

    async def set_global_steps(self, global_steps: int) -> None:
        """Name the version of the weights."""
        await self._server.call("/update_weight_version", {"new_version": str(global_steps)})
        self._step = global_steps

    async def sleep(self) -> None:
        """Free memory when running requests have ended: cache and weights if updates bring them, else the cache.

        A standalone replica shares its GPUs with nobody and stays awake.
        """
        if self.config.free_cache_engine and self._mode is not RolloutMode.STANDALONE:
            await self._server.sleep(2 if self._mode is RolloutMode.HYBRID else 1)

    async def wake_up(self, tags: list[str] | None = None) -> None:
        """Take the memory of the cache; weights come with an update."""
        if self._mode is not RolloutMode.STANDALONE and (tags is None or CACHE_TAG in tags):
            await self._server.wake_up()

    async def release_kv_cache(self) -> None:
        """Free the memory of the cache until `resume_kv_cache`."""
        if self.config.free_cache_engine and self._mode is not RolloutMode.COLOCATED:
            await self._server.sleep(1)

    async def resume_kv_cache(self) -> None:
        """Take the memory of the cache."""
        if self.config.free_cache_engine and self._mode is not RolloutMode.COLOCATED:
            await self._server.wake_up()

    async def clear_kv_cache(self) -> None:
        """Drop cached prefixes, unless requests run; an update of the weights has dropped them anyway."""
        if not self._running:
            await self._server.call("/reset_prefix_cache")

    def shutdown(self) -> None:
        """End the engine; it ends with the actor in any case."""
        self._server.stop()

    async def start_profile(self, **kwargs: Any) -> None:
        """Nothing: the server has routes of its own for profiles."""

    async def stop_profile(self) -> None:
        """Nothing."""


def settings_of(config: Any, model: Any) -> dict[str, Any]:
    """The recipe of a replica. Raises `ConfigError` for what is not supported."""
    if config.pipeline_model_parallel_size > 1:
        raise ConfigError(f"pipeline_model_parallel_size is {config.pipeline_model_parallel_size}; use 1")
    if config.quantization is not None:
        raise ConfigError(f"rollout.quantization is {config.quantization!r}; serve a quantized model.path instead")
    rank = max(model.lora_rank, model.lora.get("rank", 0))
    if rank > 0 and not model.lora.get("merge", False):
        raise ConfigError(
            f"LoRA of rank {rank} is trained; set model.lora.merge=True, so that updates are whole weights"
        )
    return {
        "model.path": model.local_path,
        "model.dtype": config.dtype,
        "model.max_model_len": config.max_model_len or config.prompt_length + config.response_length,
        "model.trust_remote_code": model.trust_remote_code,
        "parallel.tp": config.tensor_model_parallel_size,
        "parallel.sp": config.data_parallel_size,
        "cache.memory_utilization": config.gpu_memory_utilization,
        "cache.enable_prefix_caching": config.enable_prefix_caching,
        "scheduler.max_num_seqs": config.max_num_seqs,
        "scheduler.max_num_batched_tokens": config.max_num_batched_tokens,
        "runtime.enforce_eager": config.enforce_eager,
        "runtime.logprobs_mode": config.logprobs_mode,
        **_flat(config.engine_kwargs.get(SETTINGS_KEY) or {}),
    }


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted keys of nested settings."""
    found: dict[str, Any] = {}
    for key, value in settings.items():
        found |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return found
