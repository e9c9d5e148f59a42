"""`LLM`: the engine with vLLM's interface."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ulysses_infer.inference import InferenceEngine, init_inference
from ulysses_infer.outputs import RequestOutput
from ulysses_infer.sampling_params import SamplingParams


class LLM:
    """`LLM(model, **overrides)` with `generate` and `chat`; arguments as `init_inference` takes them."""

    def __init__(self, model: Any = None, config: Any = None, /, *surplus: Any, **overrides: Any) -> None:
        self.engine: InferenceEngine = init_inference(model, config, *surplus, **overrides)

    def generate(
        self,
        prompts: Any,
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        adapter: str | Sequence[str | None] | None = None,
        use_tqdm: Any = False,
    ) -> list[RequestOutput]:
        """Complete every prompt; see `InferenceEngine.generate`. use_tqdm: accepted, but there is no progress bar."""
        return self.engine.generate(prompts, sampling_params, adapter=adapter)

    def chat(
        self,
        messages: list[Any],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        adapter: str | Sequence[str | None] | None = None,
        use_tqdm: Any = False,
    ) -> list[RequestOutput]:
        """Answer one conversation (a list of message dicts) or a list of conversations; arguments as for `generate`."""
        conversations = [messages] if messages and isinstance(messages[0], dict) else messages
        return self.engine.generate(conversations, sampling_params, adapter=adapter)

    def get_default_sampling_params(self) -> SamplingParams:
        """The sampling parameters of prompts that come without any: the model's own recommendation."""
        return self.engine.default_sampling_params()

    def start_profile(self) -> None:
        """Record a trace on every rank; see `InferenceEngine.start_profile`."""
        self.engine.start_profile()

    def stop_profile(self) -> None:
        """Write the trace."""
        self.engine.stop_profile()

    def shutdown(self) -> None:
        """Stop the engine and its processes."""
        self.engine.shutdown()

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *exception: object) -> None:
        self.shutdown()
