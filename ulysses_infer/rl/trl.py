"""Rollouts for TRL's trainers: a `rollout_func` for `GRPOTrainer`, and a class in the shape of `VLLMGeneration`.

Every process of the training calls it with its own prompts; those of all processes run together, on one engine over all
of them (colocated) or on a server. The log-probabilities are those of the distribution that was sampled, as the
importance sampling of policy gradients needs them.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch.distributed as dist

from ulysses_infer.errors import ConfigError, RequestError
from ulysses_infer.model.sampling.seeds import derive_seed
from ulysses_infer.outputs import CompletionOutput
from ulysses_infer.rl.backends import ColocatedEngine, RolloutBackend, SharedServer
from ulysses_infer.rl.remote import RemoteEngine
from ulysses_infer.sampling_params import SamplingParams

PROCESSED = {"runtime.logprobs_mode": "processed_logprobs"}
COLOCATE, SERVER = "colocate", "server"


class Generated(NamedTuple):
    """What `VLLMGeneration.generate` returns: one entry per prompt of this process."""

    prompt_ids: list[list[int]]
    completion_ids: list[list[int]]
    logprobs: list[list[list[float]]] | None
    """Of each token, by descending probability; None if `logprobs` is None."""
    logprob_token_ids: list[list[list[int]]] | None


class UlyssesGeneration:
    """Generates completions for a trainer, with the arguments and methods of TRL's `VLLMGeneration` (TRL 1.16).

    mode: "colocate" runs one engine on the processes of the training, by default with tensor parallelism over
    `tensor_parallel_size` of them and sequence parallelism over the rest; "server" uses a running server, whose
    `admin_api_key` must be given and whose `runtime.logprobs_mode` should be processed_logprobs. config, overrides: as
    of `init_inference`, in colocate mode. `model_impl` and `server_timeout` have no effect. Raises `ConfigError`.
    """

    def __init__(
        self,
        model: Any,
        accelerator: Any,
        processing_class: Any,
        mode: str = COLOCATE,
        structured_outputs_regex: str | None = None,
        server_base_url: str | None = None,
        server_host: str = "127.0.0.1",
        server_port: int = 8000,
        server_timeout: float = 240.0,
        group_port: int = 51216,
        tensor_parallel_size: int = 1,
        gpu_memory_utilization: float = 0.9,
        max_model_length: int | None = None,
        max_num_seqs: int | None = None,
        enable_sleep_mode: bool = False,
        model_impl: str = "auto",
        trust_remote_code: bool = False,
        repetition_penalty: float = 1.0,
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int = 0,
        min_p: float | None = 0.0,
        max_completion_length: int = 16,
        logprobs: int | None = 0,
        generation_kwargs: dict[str, Any] | None = None,
        admin_api_key: str | None = None,
        config: Any = None,
        **overrides: Any,
    ) -> None:
        self._accelerator = accelerator
        regex = {} if structured_outputs_regex is None else {"structured_outputs": {"regex": structured_outputs_regex}}
        self.sampling: dict[str, Any] = {
            "repetition_penalty": repetition_penalty,
            "temperature": temperature,
            "top_p": top_p,
            "top_k": max(top_k or 0, 0),
            "min_p": min_p or 0.0,
            "max_tokens": max_completion_length,
            "logprobs": logprobs,
            **(generation_kwargs or {}),
            **regex,
        }
        self._num_calls = 0
        if mode == SERVER:
            url = server_base_url or f"http://{server_host}:{server_port}"
            is_main = accelerator.is_main_process
            remote = RemoteEngine(url, admin_api_key, group_port, accelerator.device) if is_main else None
            self.backend: RolloutBackend = SharedServer(model, accelerator, remote)
        elif mode == COLOCATE:
            settings = {
                "cache.memory_utilization": gpu_memory_utilization,
                "model.max_model_len": max_model_length,
                "model.trust_remote_code": trust_remote_code,
                **({} if max_num_seqs is None else {"scheduler.max_num_seqs": max_num_seqs}),
                **_layout(accelerator.num_processes, tensor_parallel_size),
                **PROCESSED,
                **overrides,
            }
            self.backend = ColocatedEngine(model, accelerator, enable_sleep_mode, config, settings)
        else:
            raise ConfigError(f"mode is {mode!r}; use {COLOCATE} or {SERVER}")

    def sync_weights(self) -> None:
        """Serve the trainer's weights. Collective."""
        self.backend.sync_weights()

    def generate(self, prompts: list[list[int]], images: Any, num_generations: int, profiler: Any = None) -> Generated:
        """Complete the prompts of this process, one completion each. Collective.

        prompts: token ids, every prompt `num_generations` times in a row. images: None; others are refused.
        """
        if images is not None and any(image is not None for image in images):
            raise RequestError("images are given; only text prompts are served")
        with profiler or nullcontext():
            gathered = _gathered(self._accelerator, prompts)
            every = [prompt for each in gathered for prompt in each]
            found = self.backend.complete(every, self._params(len(every)))
        start = sum(len(each) for each in gathered[: self._accelerator.process_index])
        return _generated(prompts, found[start : start + len(prompts)])

    def shutdown(self) -> None:
        """Free the engine's memory; the training goes on."""
        self.backend.shutdown()

    def _params(self, count: int) -> list[SamplingParams]:
        """The parameters of every prompt; each has random numbers of its own, the same in every run of one seed."""
        self._num_calls += 1
        first = derive_seed(self.sampling.get("seed", 0), self._num_calls)
        fixed = {key: value for key, value in self.sampling.items() if key != "seed"}
        seeds = [derive_seed(first, index) % 2**63 for index in range(count)]
        return [SamplingParams(**fixed, seed=seed, detokenize=False) for seed in seeds]


class RolloutFunc:
    """The `rollout_func` of TRL's `GRPOTrainer`: `GRPOTrainer(..., rollout_func=RolloutFunc())`.

    The engine starts with the first rollout, gets the weights after every step of the optimizer, and samples with the
    trainer's parameters. config, overrides: as of `UlyssesGeneration`.
    """

    def __init__(self, config: Any = None, **overrides: Any) -> None:
        self._config, self._overrides = config, overrides
        self.generation: UlyssesGeneration | None = None
        """Made by the first call."""
        self._step = -1

    def __call__(self, prompts: list[Any], trainer: Any) -> dict[str, Any]:
        """One completion of each prompt of this process, a text or messages. Collective."""
        step = trainer.state.global_step
        if self.generation is None:
            self.generation = self._start(trainer)
        elif step != self._step:
            self.generation.sync_weights()
        self._step = step
        token_ids = [_token_ids(trainer, prompt) for prompt in prompts]
        found = self.generation.generate(token_ids, None, 1)
        assert found.logprobs is not None
        logprobs = [[scores[0] for scores in of_completion] for of_completion in found.logprobs]
        return {"prompt_ids": token_ids, "completion_ids": found.completion_ids, "logprobs": logprobs}

    def shutdown(self) -> None:
        """Free the engine's memory."""
        if self.generation is not None:
            self.generation.shutdown()

    def _start(self, trainer: Any) -> UlyssesGeneration:
        arguments = trainer.args
        return UlyssesGeneration(
            trainer.model_wrapped,
            trainer.accelerator,
            trainer.processing_class,
            repetition_penalty=trainer.repetition_penalty,
            temperature=trainer.temperature,
            top_p=trainer.top_p,
            top_k=trainer.top_k,
            min_p=trainer.min_p,
            max_completion_length=trainer.max_completion_length,
            generation_kwargs={"seed": arguments.seed, **(arguments.generation_kwargs or {})},
            config=self._config,
            **self._overrides,
        )


def _token_ids(trainer: Any, prompt: Any) -> list[int]:
    tokenizer = trainer.processing_class
    if isinstance(prompt, str):
        return list(tokenizer(prompt)["input_ids"])
    options = getattr(trainer, "chat_template_kwargs", None) or {}
    found = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False, **options)
    return list(found)


def _layout(num_processes: int, tensor_parallel_size: int) -> dict[str, int]:
    """One engine over all processes. Raises `ConfigError`."""
    if tensor_parallel_size < 1 or num_processes % tensor_parallel_size:
        raise ConfigError(
            f"tensor_parallel_size is {tensor_parallel_size}; use a divisor of the {num_processes} processes"
        )
    return {"parallel.sp": num_processes // tensor_parallel_size, "parallel.tp": tensor_parallel_size}


def _gathered(accelerator: Any, prompts: list[list[int]]) -> list[list[list[int]]]:
    """The prompts of every process, in the order of processes."""
    if accelerator.num_processes == 1:
        return [prompts]
    gathered: list[Any] = [None] * accelerator.num_processes
    dist.all_gather_object(gathered, prompts)
    return gathered


def _generated(prompts: list[list[int]], outputs: Sequence[CompletionOutput]) -> Generated:
    completions = [list(output.token_ids) for output in outputs]
    if any(output.logprobs is None for output in outputs):
        return Generated(prompts, completions, None, None)
    entries = [
        [sorted(entry.items(), key=lambda item: item[1].rank or 0) for entry in output.logprobs or ()]
        for output in outputs
    ]
    values = [[[score.logprob for _, score in ranked] for ranked in each] for each in entries]
    tokens = [[[token for token, _ in ranked] for ranked in each] for each in entries]
    return Generated(prompts, completions, values, tokens)
