"""`init_inference` and `InferenceEngine`: the same calls under a launcher (every rank) and in plain Python."""

from __future__ import annotations

import atexit
import logging
import os
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, TypeVar

from ulysses_infer.config import Config, load_config
from ulysses_infer.config.loading import Overrides
from ulysses_infer.engine.arguments import arrivals_for, as_params, as_prompts, params_for
from ulysses_infer.engine.channel import SHUTDOWN
from ulysses_infer.engine.completion import Completion
from ulysses_infer.engine.engine import Engine
from ulysses_infer.engine.failure import describe, fatal, is_lost_connection
from ulysses_infer.engine.follower import follow
from ulysses_infer.engine.policies import policy_settings
from ulysses_infer.engine.processes import STOP_SECONDS, WorkerProcesses, hand_over, is_launched
from ulysses_infer.engine.prompts import load_tokenizer
from ulysses_infer.engine.setup import Rank, finish_start, make_prompt_reader, start_rank
from ulysses_infer.engine.stats import StepRecord
from ulysses_infer.errors import ConfigError, EngineDeadError, UlyssesError
from ulysses_infer.model.checkpoint import Progress
from ulysses_infer.outputs import RequestOutput
from ulysses_infer.planner.profile import Profile
from ulysses_infer.sampling_params import SamplingParams

logger = logging.getLogger(__name__)
T = TypeVar("T")
OnStep = Callable[[dict[int, RequestOutput]], None]
"""Called on rank 0 after each step with what that step touched, by the index of the prompt."""


class InferenceEngine:
    """One model on all ranks. Every public method is collective under a launcher: all ranks call it, all get the same.

    Use it as a context manager, or call `shutdown`.
    """

    def __init__(self, config: Config, model: Any = None, progress: Progress | None = None) -> None:
        self.config = config
        self._spmd = is_launched() and config.parallel.world_size > 1
        self._processes: WorkerProcesses | None = None
        self._rank: Rank | None = None
        self._engine: Engine | None = None
        self._inboxes: dict[str, list[RequestOutput]] = {}
        try:
            with ExitStack() as cleanup, self._ending_on_failure():
                self._rank = self._start(model, progress, cleanup)
                self._engine, self._weight_bytes = finish_start(self._rank, config, lambda: self._make_engine(model))
                if config.policy.name == "adaptive":
                    self._shared(lambda engine: engine.prepare_policy())
        except BaseException:
            self._end(at_once=True)
            raise
        self.is_first: bool = self._engine is not None
        """Whether this is rank 0, where the scheduler lives and where to print."""
        self.tokenizer: Any = self._engine.prompts.tokenizer if self._engine is not None else None
        """The checkpoint's tokenizer; rank 0 only, None elsewhere."""
        atexit.register(self.shutdown)

    def _start(self, model: Any, progress: Progress | None, cleanup: ExitStack) -> Rank:
        """Bring this rank up and, in plain Python, the others too."""
        config = self.config
        if config.parallel.world_size == 1 or is_launched():
            return start_rank(config, model, progress)
        if model is not None:
            config = hand_over(config, model, cleanup)
        self._processes = WorkerProcesses(config)
        return start_rank(config, None, progress, self._processes.meet)

    def _make_engine(self, model: Any) -> Engine | None:
        rank = self._live()
        if not rank.groups.is_first:
            return None
        folder = rank.folder if model is None else _folder_of(model)
        tokenizer = load_tokenizer(self.config.model, folder)
        return Engine(self.config, rank, make_prompt_reader(self.config, rank, tokenizer, model))

    @property
    def recent_steps(self) -> Sequence[StepRecord]:
        """The latest steps as they ran, oldest first, with their modes; rank 0 only, empty elsewhere."""
        return self._engine.stats.recent if self._engine is not None else ()

    @property
    def vocab_size(self) -> int:
        """Token ids are below this."""
        return self._live().worker.model.shape.vocab_size

    @property
    def max_model_len(self) -> int:
        """Most tokens of a prompt and its output together."""
        return self._live().worker.model.shape.max_model_len

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
        for all or one each. `on_step` sees, on rank 0, the requests each step touched, by prompt index.
        `arrival_steps[i]` delays prompt i until that many steps have run. Raises `RequestError` if any prompt or
        parameter is invalid, before anything runs; `EngineDeadError` when a rank is lost.
        """
        return self._shared(lambda engine: self._complete(engine, prompts, sampling_params, on_step, arrival_steps))

    def stream(self, prompt: Any, sampling_params: SamplingParams | None = None) -> Iterator[RequestOutput]:
        """Complete one prompt, yielding what there is of it after each of its tokens.

        Closing the iterator early aborts the request. Several streams may be read in turns. Under a launcher every
        rank iterates alike.
        """
        if not self.is_first:
            yield from self._follow_stream()
            return
        name = self._shared(lambda engine: engine.add(prompt, as_params(sampling_params)))
        inbox = self._inboxes[name] = []
        finished = False
        try:
            while not finished:
                while not inbox:
                    self._step()
                output = inbox.pop(0)
                finished = output.finished
                self._share(output)
                yield output
        finally:
            del self._inboxes[name]
            if self._engine is not None:
                self._engine.abort(name)
                self._share(None)

    def _follow_stream(self) -> Iterator[RequestOutput]:
        """The other ranks' side of `stream`: results come from rank 0 until None."""
        self._follow()  # the request id, or the error that `add` raised
        finished = False
        try:
            while (output := self._follow()) is not None:
                yield output
            finished = True
        finally:
            while not finished and self._rank is not None and self._follow() is not None:
                pass

    def _complete(
        self, engine: Engine, prompts: Any, sampling_params: Any, on_step: OnStep | None,
        arrival_steps: Sequence[int] | None,
    ) -> list[RequestOutput]:  # fmt: skip
        """All prompts through the engine, late ones when their step has come; results in prompt order."""
        listed = as_prompts(prompts)
        params = params_for(listed, sampling_params)
        arrivals = arrivals_for(listed, arrival_steps)
        for index in (i for i, step in enumerate(arrivals) if step > 0):
            engine.abort(engine.add(listed[index], params[index]))  # a bad one is refused before anything runs
        waiting = deque(sorted(range(len(listed)), key=arrivals.__getitem__))
        names: dict[str, int] = {}
        done: dict[int, RequestOutput] = {}
        inbox: list[RequestOutput] = []
        steps = 0
        try:
            while len(done) < len(listed):
                while waiting and (arrivals[waiting[0]] <= steps or len(done) == len(names)):
                    index = waiting.popleft()
                    name = engine.add(listed[index], params[index])
                    names[name], self._inboxes[name] = index, inbox
                self._step()
                steps += 1
                touched = {names[output.request_id]: output for output in inbox}
                inbox.clear()
                done |= {index: output for index, output in touched.items() if output.finished}
                if on_step is not None:
                    on_step(touched)
        finally:
            for name in names:
                del self._inboxes[name]
                engine.abort(name)
        return [done[index] for index in range(len(listed))]

    def _step(self) -> None:
        """One step; its results go to whoever waits for them."""
        self._live()
        assert self._engine is not None
        with self._ending_on_failure(), fatal("a step"):
            touched = self._engine.step()
        for completion in touched:
            self._deliver(completion)

    def _deliver(self, completion: Completion) -> None:
        if completion.request_id in self._inboxes:
            self._inboxes[completion.request_id].append(completion.output())

    # -- control -----------------------------------------------------------------------------------------------

    def set_policy(self, name: str, **settings: Any) -> None:
        """Change how modes are chosen, from the next step on: `set_policy("static", mode="tp")`.

        Raises `ConfigError` for an unknown policy or setting, or a mode that is not loaded.
        """
        self._shared(lambda engine: engine.set_policy(policy_settings(self.config, name, settings)))

    def explain(self, step: int | None = None) -> str:
        """Why a step, by default the latest, ran in its mode: the times predicted and taken, in one line.

        Raises `RequestError` for a step that has not run, or too long ago to be known.
        """
        return self._shared(lambda engine: engine.explain(step))

    def calibrate(self, seconds: float = 120.0) -> Profile:
        """Measure the step times of every mode for about `seconds`; returns them, and changes nothing.

        `Profile.save` writes a file for `policy.profile`. Raises `RequestError` while requests run.
        """
        return self._shared(lambda engine: engine.calibrate(seconds))

    def stats(self) -> dict[str, Any]:
        """Counters per mode (steps, tokens, seconds), switches, queues, cache and weight bytes of each rank."""
        return self._shared(
            lambda engine: {
                **engine.describe(),
                "weight_bytes_per_rank": self._weight_bytes,
                "cache_bytes_per_rank": engine.worker.cache.num_bytes,
            }
        )

    def abort(self, request_id: str) -> RequestOutput | None:
        """End a request in any state; what there is of it, or None if it is unknown."""
        return self._shared(lambda engine: self._abort(engine, request_id))

    def _abort(self, engine: Engine, request_id: str) -> RequestOutput | None:
        completion = engine.abort(request_id)
        if completion is None:
            return None
        self._deliver(completion)
        return completion.output()

    def shutdown(self) -> None:
        """Stop the engine and every process it started, and let its memory go. Safe to call again."""
        told = False
        try:
            told = self._tell_workers()
        finally:
            self._end(at_once=not told)

    def _tell_workers(self) -> bool:
        """Ask the worker processes to end; False if one of them cannot hear it any more."""
        if self._rank is not None and self._processes is not None:
            self._rank.groups.limit_waits(STOP_SECONDS)
            try:
                self._rank.channel.send(SHUTDOWN)
            except RuntimeError:
                return False
        return True

    def __enter__(self) -> InferenceEngine:
        return self

    def __exit__(self, *exception: object) -> None:
        self.shutdown()

    # -- sharing between ranks ---------------------------------------------------------------------------------

    def _shared(self, compute: Callable[[Engine], T]) -> T:
        """Compute on rank 0 and give every rank the result, or the error."""
        self._live()
        if self._engine is None:
            followed: T = self._follow()
            return followed
        try:
            with self._ending_on_failure():
                result = compute(self._engine)
        except UlyssesError as error:
            if self._spmd and self._rank is not None:
                self._rank.channel.send_error(error)
            raise
        self._share(result)
        return result

    def _follow(self) -> Any:
        with self._ending_on_failure():
            return follow(self._live())

    def _share(self, value: Any) -> None:
        if self._spmd:
            with self._ending_on_failure(), fatal("sharing a result"):
                self._live().channel.send_value(value)

    def _live(self) -> Rank:
        if self._rank is None:
            raise EngineDeadError("the engine is shut down; make a new one with init_inference")
        return self._rank

    @contextmanager
    def _ending_on_failure(self) -> Iterator[None]:
        """Anything but a refusal leaves the ranks out of step: the engine ends, and the others are let go."""
        try:
            yield
        except BaseException as error:
            if isinstance(error, UlyssesError) and not isinstance(error, EngineDeadError):
                raise
            cause = error.__cause__ or error
            losses = self._losses(cause)
            traceback.clear_frames(cause.__traceback__)  # they hold the groups that `_end` is to close
            self._end(at_once=True)
            if losses:
                raise EngineDeadError(f"the engine ended: {losses}") from cause
            if isinstance(error, EngineDeadError) or not isinstance(error, Exception):
                raise
            raise EngineDeadError(f"the engine ended: {describe(error)}") from error

    def _losses(self, cause: BaseException) -> str:
        """Which worker processes are gone, if that is what an exchange failed for."""
        if self._processes is None or not isinstance(cause, RuntimeError) or isinstance(cause, UlyssesError):
            return ""
        return self._processes.losses(wait=is_lost_connection(cause))

    def _end(self, at_once: bool) -> None:
        """Leave the group, end the workers; weights and cache go with the references to them."""
        processes, rank = self._processes, self._rank
        self._processes = self._rank = self._engine = None
        atexit.unregister(self.shutdown)
        if processes is not None:
            processes.stop(at_once)
        elif rank is not None:
            rank.groups.close()


def init_inference(model: Any = None, config: Any = None, **overrides: Any) -> InferenceEngine:
    """Load a model and bring all ranks up.

    model: hub id, folder or `transformers.PreTrainedModel`; None takes the recipe's `model.path`. config: recipe path,
    dict or `Config`. overrides: nested dicts (`parallel={"sp": 2}`) or, through `**{"a.b": c}`, dotted keys; one that
    clashes with a dict `config` raises. In plain Python with `parallel` sizes above 1 the engine starts its own worker
    processes; under `deepspeed`, `torchrun` or `accelerate launch` every rank calls this alike.

    Raises `ConfigError`, `CheckpointError` or `UnsupportedModelError`, each with one line, on every rank.
    """
    settings = _with_model(model, config, overrides)
    in_memory = None if model is None or isinstance(model, str | os.PathLike) else _unwrapped(model)
    loaded = load_config(config, settings, strict_clash=isinstance(config, Mapping))
    logging.getLogger("ulysses_infer").setLevel(loaded.runtime.log_level.upper())
    return InferenceEngine(loaded, in_memory)


def _unwrapped(model: Any) -> Any:
    """The `transformers.PreTrainedModel` itself, out of a DeepSpeed or data-parallel engine. Raises `ConfigError`."""
    from transformers import PreTrainedModel

    inner = getattr(model, "module", model)
    if not isinstance(inner, PreTrainedModel):
        raise ConfigError(
            f"model is a {type(model).__name__}; give a hub id, a folder or a transformers.PreTrainedModel"
        )
    if any(hasattr(parameter, "ds_id") for parameter in inner.parameters()):
        raise ConfigError(
            "the model's weights are partitioned by ZeRO stage 3, so no rank has them whole; save a checkpoint with "
            "consolidated weights and give its folder"
        )
    return inner


def _with_model(model: Any, config: Any, overrides: Mapping[str, Any]) -> Overrides:
    if model is None:
        return overrides
    if not isinstance(model, str | os.PathLike):
        return {**overrides, "model.path": getattr(model, "name_or_path", "") or "(a model in memory)"}
    return {**overrides, "model.path": str(model)}


def _folder_of(model: Any) -> Path | None:
    """Where a model in memory was loaded from, a folder or the hub's cache: its tokenizer is there too."""
    from huggingface_hub import try_to_load_from_cache

    name = getattr(model, "name_or_path", "") or ""
    if name and Path(name).is_dir():
        return Path(name)
    cached = try_to_load_from_cache(name, "tokenizer_config.json") if name.count("/") == 1 else None
    return Path(cached).parent if isinstance(cached, str) else None
