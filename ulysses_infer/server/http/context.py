"""The application context: what every route needs."""

from __future__ import annotations

import functools
import hashlib
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from starlette.requests import Request

from ulysses_infer.config import Config
from ulysses_infer.errors import EngineDeadError, OverloadedError
from ulysses_infer.server.http.errors import ApiError
from ulysses_infer.server.http.texts import Texts, load_texts
from ulysses_infer.server.http.vectors.judge import make_judge
from ulysses_infer.server.http.vectors.pooling import recommended_pooling
from ulysses_infer.server.messages import Ready
from ulysses_infer.server.reasoning import ReasoningFormat, choose_reasoning
from ulysses_infer.server.router import Served
from ulysses_infer.server.tool_calls import ToolFormat, choose_format
from ulysses_infer.version import __version__

if TYPE_CHECKING:
    from ulysses_infer.server.observe import Observatory


@dataclass
class AppContext:
    """The parts of the HTTP process that routes use."""

    config: Config
    client: Served
    texts: Texts
    observatory: Observatory
    tool_format: ToolFormat | None = None
    """The model's tool-call format; None: outputs are not parsed for calls."""
    reasoning_format: ReasoningFormat | None = None
    """The model's reasoning format; None: outputs are not parsed for reasoning."""
    created: int = field(default_factory=lambda: int(time.time()))
    running: dict[str, list[str]] = field(default_factory=dict)
    """Ids of responses in progress, with the ids of their engine requests."""

    def __post_init__(self) -> None:
        self.judge = make_judge(self.config, self.texts)
        """How /v1/score judges pairs of texts; None: by the cosine of their vectors."""
        self.adapters = dict(self.config.lora.adapters)
        """Paths of LoRA adapters, by name."""

    @functools.cached_property
    def pooling(self) -> str:
        """How prompts become vectors."""
        return self.config.server.pooling or recommended_pooling(self.config.model.path)

    @functools.cached_property
    def model_name(self) -> str:
        """The model's name in the API."""
        return self.config.served_model_name

    @property
    def model_names(self) -> list[str]:
        """The model's name, then those of its adapters."""
        return [self.model_name, *self.adapters]

    @cached_property
    def fingerprint(self) -> str:
        """Changes when the same seed may give other outputs: with the version, the model or the layout."""
        parts = (__version__, self.config.model, self.config.parallel, self.config.runtime.attention_backend)
        return "fp_" + hashlib.blake2s(repr(parts).encode(), digest_size=5).hexdigest()

    def check_model(self, name: str | None) -> None:
        """Raises `ApiError` 404 unless `name` is the served model, one of its adapters, or None."""
        if name is not None and name not in self.model_names:
            served = ", ".join(map(repr, self.model_names))
            message = f"the model {name[:200]!r} does not exist; this server has {served}"
            raise ApiError(404, message, param="model", code="model_not_found")

    def choose_model(self, name: str | None) -> str:
        """The name of a request's model or adapter. Raises `ApiError`: 404 for an unknown one, 400 if the request
        names none and there is no default."""
        self.check_model(name)
        default = self.config.server.default_model
        if name is None and default is None and self.adapters:
            choices = ", ".join(map(repr, self.model_names))
            message = f"model is missing; this server has {choices} (server.default_model sets a default)"
            raise ApiError(400, message, param="model", code="missing_field")
        return name or default or self.model_name

    def adapter_of(self, model: str) -> str | None:
        """The adapter that a chosen model name stands for; None: the model itself."""
        return model if model in self.adapters else None

    @property
    def sampling_defaults(self) -> Mapping[str, Any]:
        """Values of sampling parameters that requests do not set: the model's own (none while it loads), and
        `server.default_max_tokens`."""
        defaults = {} if self.client.info is None else self.client.info.sampling_defaults
        most = self.config.server.default_max_tokens
        return defaults if most is None else {**defaults, "max_tokens": most}

    def engine_info(self) -> Ready:
        """What was loaded. Raises `OverloadedError` while loading, `EngineDeadError` if the engine is dead."""
        if self.client.death:
            raise EngineDeadError(self.client.death)
        if self.client.info is None:
            raise OverloadedError("the engine is still loading the model; try again when /ready returns 200")
        return self.client.info

    @contextmanager
    def registered(self, answer_id: str, request_ids: Sequence[str]) -> Iterator[None]:
        """Register the response under its id while the block runs. Raises `ApiError` 400 if the id is in use."""
        if answer_id in self.running:
            raise ApiError(400, f"the id {answer_id!r} is in use; use another", param="request_id", code="id_in_use")
        self.running[answer_id] = list(request_ids)
        try:
            yield
        finally:
            del self.running[answer_id]


def make_context(config: Config, client: Served, observatory: Observatory) -> AppContext:
    """Load the tokenizer and create the context. Raises `CheckpointError`, `ConfigError`."""
    texts = load_texts(config)
    tool_format = choose_format(config.server.tool_call_parser, texts.chat_template)
    reasoning_format = choose_reasoning(config.server.reasoning_parser, texts.chat_template)
    return AppContext(config, client, texts, observatory, tool_format, reasoning_format)


def context_of(request: Request) -> AppContext:
    """The context of the application that serves `request`."""
    context: AppContext = request.app.state.context
    return context
