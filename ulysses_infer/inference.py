"""`init_inference` and `InferenceEngine`: the same calls under a launcher (every rank) and in plain Python."""

from __future__ import annotations

import atexit
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from ulysses_infer.config import Config, PolicyConfig, load_config
from ulysses_infer.config.loading import Overrides
from ulysses_infer.engine.channel import SHUTDOWN
from ulysses_infer.engine.engine import Engine
from ulysses_infer.engine.follower import follow
from ulysses_infer.engine.processes import WorkerProcesses, hand_over, is_launched
from ulysses_infer.engine.prompts import PromptReader, load_tokenizer
from ulysses_infer.engine.setup import Rank, eos_token_ids, start_rank
from ulysses_infer.errors import EngineDeadError, RequestError, UlyssesError
from ulysses_infer.model.checkpoint import Progress
from ulysses_infer.outputs import RequestOutput
from ulysses_infer.sampling_params import SamplingParams

logger = logging.getLogger(__name__)
T = TypeVar("T")
OnStep = Callable[[list[RequestOutput]], None]


class InferenceEngine:
    """One model on all ranks. Every public method is collective under a launcher: all ranks call it, all get the same.

    Use it as a context manager, or call `shutdown`.
    """

    def __init__(self, config: Config, model: Any = None, progress: Progress | None = None) -> None:
        self.config = config
        self._processes: WorkerProcesses | None = None
        self._spmd = is_launched() and config.parallel.world_size > 1
        self._is_shut_down = False
        self._engine: Engine | None = None
        if config.parallel.world_size > 1 and not is_launched():
            config, model = hand_over(config, model)
            self._processes = WorkerProcesses.start(config)
        atexit.register(self.shutdown)
        try:
            self._rank = start_rank(config, model, progress)
            self._finish_start(model)
        except BaseException:
            self._stop_processes()
            raise

    def _finish_start(self, model: Any) -> None:
        """Tokenizer and scheduler, on rank 0 only; the other ranks wait to hear how it went."""
        rank, error = self._rank, None
        if rank.groups.is_first:
            try:
                self._engine = Engine(self.config, rank, _prompt_reader(self.config, rank, model))
            except UlyssesError as raised:
                error = raised
        rank.channel.agree(error)
        self._weight_bytes = rank.channel.gather(rank.worker.model.weight_bytes)
        if self._processes is not None:
            self._processes.started()

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, where the scheduler lives and where to print."""
        return self._rank.groups.is_first

    @property
    def tokenizer(self) -> Any:
        """The checkpoint's tokenizer; rank 0 only, None elsewhere."""
        return self._engine.prompts.tokenizer if self._engine is not None else None

    # -- generation --------------------------------------------------------------------------------------------

    def generate(
        self,
        prompts: Any,
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        on_step: OnStep | None = None,
        arrival_steps: Sequence[int] | None = None,
    ) -> list[RequestOutput]:
        """Complete every prompt; results in prompt order.

        prompts: text, token ids, or a list of those (a list of message dicts is one chat). `sampling_params` is one
        for all or one each. `on_step` sees, on rank 0, the requests each step touched. `arrival_steps[i]` delays
        prompt i until that many steps have run. Raises `RequestError` if any prompt or parameter is invalid, before
        anything runs; `EngineDeadError` when a rank is lost.
        """
        return self._shared(lambda engine: _generate(engine, prompts, sampling_params, on_step, arrival_steps))

    def stream(self, prompt: Any, sampling_params: SamplingParams | None = None) -> Iterator[RequestOutput]:
        """Complete one prompt, yielding what there is of it after each of its tokens.

        Closing the iterator early aborts the request. Under a launcher every rank iterates alike.
        """
        if self._engine is None:
            yield from self._follow_stream()
            return
        engine, name = self._alive(), ""
        try:
            name = self._shared(lambda engine: engine.add(prompt, sampling_params or SamplingParams()))
            while engine.has_unfinished:
                for output in self._guarded(engine.step):
                    if output.request_id == name:
                        self._share(output)
                        yield output
        finally:
            if name and not self._is_shut_down:
                engine.abort(name)
                self._share(None)

    def _follow_stream(self) -> Iterator[RequestOutput]:
        """The other ranks' side of `stream`: results come from rank 0 until None."""
        follow(self._rank)  # the request id, or the error that `add` raised
        finished = False
        try:
            while (output := follow(self._rank)) is not None:
                yield output
            finished = True
        finally:
            while not finished and follow(self._rank) is not None:
                pass

    # -- control -----------------------------------------------------------------------------------------------

    def set_policy(self, name: str, **settings: Any) -> None:
        """Change how modes are chosen, from the next step on: `set_policy("static", mode="tp")`.

        Raises `ConfigError` for an unknown policy or setting, or a mode that is not loaded.
        """
        self._shared(lambda engine: engine.set_policy(_policy_settings(self.config, name, settings)))

    def stats(self) -> dict[str, Any]:
        """Counters per mode (steps, tokens, seconds), switches, queues, cache and weight bytes of each rank."""
        cache = self._rank.worker.cache
        return self._shared(
            lambda engine: {
                **engine.describe(),
                "weight_bytes_per_rank": self._weight_bytes,
                "cache_bytes_per_rank": cache.num_bytes,
            }
        )

    def abort(self, request_id: str) -> RequestOutput | None:
        """End a request in any state; what there is of it, or None if it is unknown."""
        return self._shared(lambda engine: engine.abort(request_id))

    def shutdown(self) -> None:
        """Stop the engine and every process it started. Safe to call again."""
        if self._is_shut_down:
            return
        self._is_shut_down = True
        atexit.unregister(self.shutdown)
        if self._processes is not None:
            if self._processes.are_alive:
                self._rank.channel.send(SHUTDOWN)
            self._stop_processes()

    def __enter__(self) -> InferenceEngine:
        return self

    def __exit__(self, *exception: object) -> None:
        self.shutdown()

    # -- sharing between ranks ---------------------------------------------------------------------------------

    def _shared(self, compute: Callable[[Engine], T]) -> T:
        """Compute on rank 0 and give every rank the result, or the error."""
        if self._engine is None:
            self._check_alive()
            result: T = follow(self._rank)
            return result
        engine = self._alive()
        try:
            result = self._guarded(lambda: compute(engine))
        except UlyssesError as error:
            if self._spmd and not isinstance(error, EngineDeadError):
                self._rank.channel.send_error(error)
            raise
        self._share(result)
        return result

    def _share(self, value: Any) -> None:
        if self._spmd:
            self._rank.channel.send_value(value)

    def _alive(self) -> Engine:
        self._check_alive()
        assert self._engine is not None
        return self._engine

    def _check_alive(self) -> None:
        if self._is_shut_down:
            raise EngineDeadError("the engine is shut down; make a new one with init_inference")

    def _guarded(self, compute: Callable[[], T]) -> T:
        """Anything but a refused request leaves the ranks out of step: the engine ends."""
        try:
            return compute()
        except EngineDeadError:
            self._die()
            raise
        except UlyssesError:
            raise
        except BaseException as error:
            self._die()
            if isinstance(error, KeyboardInterrupt | SystemExit):
                raise
            raise EngineDeadError(f"a step failed and the engine ended: {type(error).__name__}: {error}") from error

    def _die(self) -> None:
        self._is_shut_down = True
        atexit.unregister(self.shutdown)
        self._stop_processes(at_once=True)

    def _stop_processes(self, at_once: bool = False) -> None:
        if self._processes is not None:
            self._processes.stop(at_once)
            self._processes = None


def init_inference(model: Any = None, config: Any = None, **overrides: Any) -> InferenceEngine:
    """Load a model and bring all ranks up.

    model: hub id, folder or `transformers.PreTrainedModel`; None takes the recipe's `model.path`. config: recipe path,
    dict or `Config`. overrides: nested dicts (`parallel={"sp": 2}`) or, through `**{"a.b": c}`, dotted keys; one that
    clashes with a dict `config` raises. In plain Python with `parallel` sizes above 1 the engine starts its own worker
    processes; under `deepspeed`, `torchrun` or `accelerate launch` every rank calls this alike.

    Raises `ConfigError`, `CheckpointError` or `UnsupportedModelError`, each with one line, on every rank.
    """
    settings = _with_model(model, config, overrides)
    loaded = load_config(config, settings, strict_clash=isinstance(config, Mapping))
    logging.getLogger("ulysses_infer").setLevel(loaded.runtime.log_level.upper())
    in_memory = None if model is None or isinstance(model, str | os.PathLike) else model
    return InferenceEngine(loaded, in_memory)


def _with_model(model: Any, config: Any, overrides: Mapping[str, Any]) -> Overrides:
    if model is None:
        return overrides
    if not isinstance(model, str | os.PathLike):
        return {**overrides, "model.path": getattr(model, "name_or_path", "") or "(a model in memory)"}
    return {**overrides, "model.path": str(model)}


def _policy_settings(config: Config, name: str, settings: Mapping[str, Any]) -> PolicyConfig:
    """Checked like a recipe's `policy` section, against this engine's parallel layout."""
    tree: dict[str, Any] = {"model.path": config.model.path, "policy.name": name}
    parallel = config.parallel
    tree |= {"parallel.sp": parallel.sp, "parallel.tp": parallel.tp, "parallel.modes": parallel.modes}
    return load_config(None, {**tree, **{f"policy.{key}": value for key, value in settings.items()}}).policy


def _prompt_reader(config: Config, rank: Rank, model: Any) -> PromptReader:
    tokenizer = load_tokenizer(config.model, rank.folder or _folder_of(model))
    shape, hf_config = rank.worker.model.shape, rank.worker.model.injection.config
    eos = eos_token_ids(rank.folder, model, hf_config, tokenizer)
    return PromptReader(tokenizer, shape.vocab_size, eos, config.model.seed)


def _folder_of(model: Any) -> Path | None:
    """Where a model in memory came from, if that is a folder: its tokenizer is there too."""
    place = Path(getattr(model, "name_or_path", "") or "")
    return place if place.name and place.is_dir() else None


def _generate(
    engine: Engine, prompts: Any, sampling_params: Any, on_step: OnStep | None, arrival_steps: Sequence[int] | None
) -> list[RequestOutput]:
    """All prompts through the engine, late ones when their step has come; results in prompt order."""
    listed = as_prompts(prompts)
    params = _params_for(listed, sampling_params)
    arrivals = list(arrival_steps) if arrival_steps is not None else [0] * len(listed)
    if len(arrivals) != len(listed):
        raise RequestError(f"{len(arrivals)} arrival steps for {len(listed)} prompts; give one each")
    waiting = sorted(range(len(listed)), key=lambda i: arrivals[i])
    names: dict[str, int] = {}
    done: dict[int, RequestOutput] = {}
    steps = 0
    try:
        while waiting or engine.has_unfinished:
            while waiting and (arrivals[waiting[0]] <= steps or not engine.has_unfinished):
                index = waiting.pop(0)
                names[engine.add(listed[index], params[index])] = index
            outputs = engine.step()
            done.update({names[output.request_id]: output for output in outputs if output.finished})
            steps += 1
            if on_step is not None:
                on_step(outputs)
    except RequestError:
        engine.abort_all()
        raise
    return [done[index] for index in range(len(listed))]


def as_prompts(prompts: Any) -> list[Any]:
    """One prompt or many, as a list of prompts."""
    single = isinstance(prompts, str) or not isinstance(prompts, list | tuple)
    if single or (prompts and all(isinstance(part, int | dict) for part in prompts)):
        return [prompts]
    return list(prompts)


def _params_for(prompts: list[Any], sampling_params: Any) -> list[SamplingParams]:
    if sampling_params is None:
        return [SamplingParams()] * len(prompts)
    if isinstance(sampling_params, SamplingParams):
        return [sampling_params] * len(prompts)
    listed = list(sampling_params)
    if len(listed) != len(prompts):
        raise RequestError(f"{len(listed)} sampling params for {len(prompts)} prompts; give one for all, or one each")
    return listed
