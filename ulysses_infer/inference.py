"""`init_inference` and `InferenceEngine`, the Python interface, under a launcher or in plain Python."""

from __future__ import annotations

import atexit
import logging
import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, TypeVar

from ulysses_infer.config import Config, load_config
from ulysses_infer.config.arguments import chosen_arguments, with_model
from ulysses_infer.engine import operations
from ulysses_infer.engine.engine import Engine
from ulysses_infer.engine.generate_inputs import GenerateInput, arrivals_for, as_params, generate_inputs
from ulysses_infer.engine.policies import policy_settings
from ulysses_infer.engine.stats import StepRecord
from ulysses_infer.errors import fatal
from ulysses_infer.job.adapters import announce_adapter, drop_adapters, load_adapter
from ulysses_infer.job.multi_rank_engine import MultiRankEngine
from ulysses_infer.job.processes import (
    WorkerProcesses,
    hand_over,
    hand_over_weights,
    is_launched,
)
from ulysses_infer.job.profiling import check_profile, new_trace, start_profile, stop_profile
from ulysses_infer.job.prompt_reader import make_prompt_reader
from ulysses_infer.job.start_rank import finish_start, start_rank
from ulysses_infer.job.subscriptions import Subscriptions
from ulysses_infer.job.weights import sleep, update_weights, wake_up
from ulysses_infer.model.loading.checkpoint import Progress
from ulysses_infer.model.loading.sources import GivenModel, given_model
from ulysses_infer.outputs import RequestOutput, normalized
from ulysses_infer.sampling_params import SamplingParams
from ulysses_infer.step_time.profile import Profile
from ulysses_infer.text.prompts import load_tokenizer
from ulysses_infer.worker.rank import Rank

logger = logging.getLogger(__name__)
T = TypeVar("T")
OnStep = Callable[[dict[int, RequestOutput]], None]
"""Called on rank 0 after each step with the outputs that got a token in it, by prompt index."""


class InferenceEngine(MultiRankEngine):
    """One model on all ranks. Under a launcher every public method is collective: all ranks call it and get the same
    result.

    Use it as a context manager, or call `shutdown`.
    """

    def __init__(self, config: Config, model: GivenModel | None = None, progress: Progress | None = None) -> None:
        super().__init__(spmd=is_launched() and config.parallel.world_size > 1)
        self.config = config
        self._subscriptions = Subscriptions()
        try:
            with ExitStack() as cleanup, self._end_on_failure():
                self._rank = self._start(model, progress, cleanup)
                self._engine, self._weight_bytes = finish_start(self._rank, config, lambda: self._make_engine(model))
                if config.policy.name == "adaptive":
                    self._on_rank_0(lambda engine: engine.policies.prepare())
        except BaseException:
            self._end(at_once=True)
            raise
        self.is_first: bool = self._engine is not None
        """Whether this is rank 0, where the scheduler runs and where to print."""
        self.tokenizer: Any = self._engine.prompts.tokenizer if self._engine is not None else None
        """The checkpoint's tokenizer on rank 0; None on other ranks."""
        atexit.register(self.shutdown)

    def _start(self, model: GivenModel | None, progress: Progress | None, cleanup: ExitStack) -> Rank:
        """Start this rank and, in plain Python, the worker processes of the other ranks."""
        config = self.config
        if config.parallel.world_size == 1 or is_launched():
            return start_rank(config, model, progress)
        if model is not None:
            config = hand_over(config, model, cleanup)
        self._processes = WorkerProcesses(config)
        return start_rank(config, None, progress, self._processes.meet)

    def _make_engine(self, model: GivenModel | None) -> Engine | None:
        rank = self._running_rank()
        if not rank.groups.is_first:
            return None
        folder = rank.folder if model is None else model.folder
        tokenizer = load_tokenizer(self.config.model, folder)
        return Engine(self.config, rank, make_prompt_reader(self.config, rank, tokenizer, model))

    @property
    def recent_steps(self) -> Sequence[StepRecord]:
        """The latest steps with their modes, oldest first; empty on other ranks than 0."""
        return self._engine.stats.recent if self._engine is not None else ()

    @property
    def vocab_size(self) -> int:
        """The size of the vocabulary; valid token ids are below it."""
        return self._running_rank().worker.model.shape.vocab_size

    @property
    def max_model_len(self) -> int:
        """The most tokens of a prompt and its output together."""
        return self._running_rank().worker.model.shape.max_model_len

    # -- generation --------------------------------------------------------------------------------------------

    def generate(
        self,
        prompts: Any,
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        on_step: OnStep | None = None,
        arrival_steps: Sequence[int] | None = None,
        adapter: str | Sequence[str | None] | None = None,
    ) -> list[RequestOutput]:
        """Complete every prompt; results in prompt order.

        prompts: text, token ids, or a list of those (a list of message dicts is one chat). `sampling_params` is one
        for all or one each. `on_step` sees, on rank 0, the requests each step touched, by prompt index.
        `arrival_steps[i]` delays prompt i until that many steps have run. `adapter` is the name of a LoRA adapter, one
        for all or one each. Raises `RequestError` if any prompt or parameter is invalid, before anything runs;
        `EngineDeadError` when a rank is lost. In plain Python, Ctrl-C aborts the requests and leaves the engine usable;
        a second one within a second ends it.
        """
        with self._interruptible():
            return self._on_rank_0(
                lambda engine: self._complete(
                    engine,
                    generate_inputs(prompts, sampling_params, adapter, engine.prompts.sampling_defaults),
                    on_step,
                    arrival_steps,
                )
            )

    def stream(
        self, prompt: Any, sampling_params: SamplingParams | None = None, adapter: str | None = None
    ) -> Iterator[RequestOutput]:
        """Complete one prompt, yielding its output after each token.

        Closing the iterator early aborts the request. Several streams may be read alternately. Under a launcher every
        rank has to iterate.
        """
        if not self.is_first:
            yield from self._follow_stream()
            return
        name = ""
        inbox: list[RequestOutput] = []
        finished = False
        try:
            with self._interruptible():
                name = self._on_rank_0(lambda engine: self._add_stream(engine, prompt, sampling_params, adapter, inbox))
            while not finished:
                with self._interruptible():
                    while not inbox:
                        self._step()
                output = inbox.pop(0)
                finished = output.finished
                self._broadcast(output)
                yield output
        finally:
            if self._subscriptions.remove(name) and self._engine is not None:
                self._engine.abort(name)
                self._broadcast(None)

    def embed(self, prompts: Any, pooling: str = "last", normalize: bool = True) -> list[list[float]]:
        """One vector per prompt, from the model's hidden states after its last norm.

        prompts: as of `generate`. pooling: last (the last token's state), mean, or cls (the first token's).
        normalize: divide by the length. Raises `RequestError` if any prompt is invalid.
        """
        params = SamplingParams(max_tokens=1, temperature=0, pooling=pooling, detokenize=False)
        vectors = [output.pooled or [] for output in self.generate(prompts, params)]
        return [normalized(vector) for vector in vectors] if normalize else vectors

    def _add_stream(
        self, engine: Engine, prompt: Any, given: Any, adapter: str | None, inbox: list[RequestOutput]
    ) -> str:
        params = as_params(given, engine.prompts.sampling_defaults)
        name = _add(engine, GenerateInput(prompt, params, adapter))
        self._subscriptions.add(name, params, inbox)
        return name

    def _follow_stream(self) -> Iterator[RequestOutput]:
        """The other ranks' side of `stream`: outputs come from rank 0, until None."""
        self._receive()  # the request id, or the error that `add` raised
        finished = False
        try:
            while (output := self._receive()) is not None:
                yield output
            finished = True
        finally:
            while not finished and self._rank is not None and self._receive() is not None:
                pass

    def _complete(
        self, engine: Engine, inputs: list[GenerateInput], on_step: OnStep | None, arrival_steps: Sequence[int] | None
    ) -> list[RequestOutput]:
        """Run all prompts through the engine, late ones from their arrival step; results in prompt order."""
        arrivals = arrivals_for(inputs, arrival_steps)
        for index in (i for i, step in enumerate(arrivals) if step > 0):
            engine.abort(_add(engine, inputs[index]))  # refuse invalid ones before anything runs
        waiting = deque(sorted(range(len(inputs)), key=arrivals.__getitem__))
        names: dict[str, int] = {}
        done: dict[int, RequestOutput] = {}
        inbox: list[RequestOutput] = []
        steps = 0
        try:
            while len(done) < len(inputs):
                while waiting and (arrivals[waiting[0]] <= steps or len(done) == len(names)):
                    index = waiting.popleft()
                    name = _add(engine, inputs[index])
                    names[name] = index
                    self._subscriptions.add(name, inputs[index].params, inbox, only_finished=on_step is None)
                    self._interrupts.check()
                self._step()
                steps += 1
                touched = {names[output.request_id]: output for output in inbox}
                inbox.clear()
                done |= {index: output for index, output in touched.items() if output.finished}
                if on_step is not None:
                    on_step(touched)
        finally:
            for name in names:
                self._subscriptions.remove(name)
                engine.abort(name)
        return [done[index] for index in range(len(inputs))]

    def _step(self) -> None:
        """Run one step and hand its outputs to those who wait for them."""
        self._interrupts.check()
        self._running_rank()
        assert self._engine is not None
        with self._end_on_failure(), fatal("a step"):
            touched = self._engine.step()
        for completion in touched:
            self._subscriptions.deliver(completion)

    # -- control -----------------------------------------------------------------------------------------------

    def set_policy(self, name: str, **settings: Any) -> None:
        """Change the policy from the next step on: `set_policy("static", mode="tp")`.

        Raises `ConfigError` for an unknown policy or setting, or a mode that is not loaded.
        """
        self._on_rank_0(lambda engine: engine.policies.set_policy(policy_settings(self.config, name, settings)))

    def explain(self, step: int | None = None) -> str:
        """Why a step, by default the latest, ran in its mode: predicted and measured times, in one line.

        Raises `RequestError` for a step that has not run or is no longer recorded.
        """
        return self._on_rank_0(lambda engine: engine.stats.find(step).explain())

    def calibrate(self, seconds: float = 120.0) -> Profile:
        """Measure the step times of every mode for about `seconds` and return them; the policy is not changed.

        `Profile.save` writes a file for `policy.profile`. Raises `RequestError` while requests run.
        """
        return self._on_rank_0(lambda engine: engine.policies.calibrate(seconds))

    def default_sampling_params(self) -> SamplingParams:
        """The sampling parameters of prompts that come without any: the model's own recommendation."""
        return self._on_rank_0(lambda engine: SamplingParams(**engine.prompts.sampling_defaults))

    def stats(self) -> dict[str, Any]:
        """Counters per mode (steps, tokens, seconds), switches, queues, cache, and weight bytes per rank."""
        return self._on_rank_0(
            lambda engine: {
                **operations.describe(engine),
                "weight_bytes_per_rank": self._weight_bytes,
                "cache_bytes_per_rank": engine.worker.cache.num_bytes,
            }
        )

    def abort(self, request_id: str) -> RequestOutput | None:
        """End a request in any state; returns its output so far, or None if it is unknown."""
        return self._on_rank_0(lambda engine: self._abort(engine, request_id))

    def _abort(self, engine: Engine, request_id: str) -> RequestOutput | None:
        completion = engine.abort(request_id)
        if completion is None:
            return None
        self._subscriptions.deliver(completion)
        return self._subscriptions.output(completion)

    # -- weights and memory ------------------------------------------------------------------------------------

    def update_weights(self, source: Any) -> None:
        """Serve the weights of `source` from now on, on the same ranks, process groups and cache. Cached prefixes are
        dropped.

        source: new weights of the served model, as the `DeepSpeedEngine` that trains it, a
        `transformers.PreTrainedModel`, a state dict, or a folder as for `init_inference`. Raises `RequestError` while
        requests run, and `CheckpointError` for missing or misshapen tensors before anything is written.
        """
        self._on_rank_0(lambda engine: engine.requests.check_idle("an update of the weights"))
        with ExitStack() as cleanup:
            if self._processes is not None:
                source = hand_over_weights(source, cleanup)
            self._on_all_ranks(update_weights, source)
        self._on_rank_0(operations.weights_changed)

    def load_adapter(self, name: str, path: str, replace: bool = False) -> None:
        """Serve a LoRA adapter, a folder or hub id, from the next request on; others may be running.

        replace: it may replace the one of this name. Needs `lora.runtime_bytes`. Raises `RequestError` or
        `CheckpointError` if it cannot be served.
        """
        new = self._on_rank_0(lambda engine: announce_adapter(engine, name, path, replace))
        self._on_all_ranks(load_adapter, new.name, new.folder, new.number)
        self._on_rank_0(lambda engine: engine.requests.adapters.add(new.name, new.num_bytes))
        self._drop_unused_adapters()

    def unload_adapter(self, name: str) -> None:
        """Refuse new requests with a LoRA adapter; those that run go on. Raises `RequestError` for an unknown name."""
        self._on_rank_0(lambda engine: engine.requests.adapters.remove(name))
        self._drop_unused_adapters()

    def _drop_unused_adapters(self) -> None:
        unused = self._on_rank_0(lambda engine: engine.requests.take_unused_adapters())
        if unused:
            self._on_all_ranks(drop_adapters, unused)

    def sleep(self, level: int = 1) -> None:
        """Free the memory of the cache and, with level 2, of the weights, until `wake_up`.

        After level 2, `update_weights` must bring new weights, before or after waking up. Raises `RequestError` while
        requests run; requests are refused while it sleeps.
        """
        self._on_rank_0(lambda engine: operations.fall_asleep(engine, level))
        self._on_all_ranks(sleep, level)

    def wake_up(self) -> None:
        """Allocate the cache again; does nothing if awake. If the memory is not available it raises, and the engine
        stays asleep."""
        if self._on_rank_0(lambda engine: engine.sleep.level):
            self._on_all_ranks(wake_up)
            self._on_rank_0(operations.wake_up)

    def start_profile(self) -> None:
        """Record a trace of torch's profiler on every rank, to `runtime.profile_folder`, until `stop_profile`.

        Raises `RequestError` if no folder is set or a trace is being recorded.
        """
        self._on_all_ranks(start_profile, *self._on_rank_0(new_trace))

    def stop_profile(self) -> None:
        """Write the trace. Raises `RequestError` if none is being recorded."""
        self._on_rank_0(check_profile)
        self._on_all_ranks(stop_profile)

    def __enter__(self) -> InferenceEngine:
        return self

    def __exit__(self, *exception: object) -> None:
        self.shutdown()


def _add(engine: Engine, given: GenerateInput) -> str:
    """Queue one prompt; returns its request id. Raises `RequestError`."""
    return engine.add(given.prompt, given.params.as_computed(), adapter=given.adapter)


def init_inference(model: Any = None, config: Any = None, /, *surplus: Any, **overrides: Any) -> InferenceEngine:
    """Load a model and bring all ranks up.

    model: hub id, folder (DeepSpeed ZeRO checkpoints included), `transformers.PreTrainedModel` or the
    `DeepSpeedEngine` that trains one; None takes the recipe's `model.path`. config: recipe path, dict or `Config`.
    overrides: nested dicts (`parallel={"sp": 2}`, also `model={"dtype": "float32"}` beside a model) or, through
    `**{"a.b": c}`, dotted keys; one that clashes with a dict `config` raises. In plain Python with `parallel` sizes
    above 1 the engine starts its own worker processes; under `deepspeed`, `torchrun` or `accelerate launch` every rank
    calls this alike. With a DeepSpeed engine these are the ranks that train: the base mode is then, unless given, SP as
    in the training and TP over the rest.

    Raises `ConfigError`, `CheckpointError` or `UnsupportedModelError`, each with one line, on every rank.
    """
    model, config = chosen_arguments(model, config, surplus, overrides)
    settings = with_model(model, overrides)
    given = None if model is None or isinstance(model, str | os.PathLike) else given_model(model)
    loaded = load_config(
        config, settings, strict_clash=isinstance(config, Mapping), defaults=given.default_base if given else None
    )
    logging.getLogger("ulysses_infer").setLevel(loaded.runtime.log_level.upper())
    return InferenceEngine(loaded, given)
