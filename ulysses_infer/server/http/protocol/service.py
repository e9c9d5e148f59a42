"""Types of models, health, version and administration."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import msgspec
from pydantic import Field, field_validator, model_validator

from ulysses_infer.server.http.protocol.common import Body, ResponseBody


class ModelCard(ResponseBody):
    """A served model, or an adapter of it."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str = Field(description="Path or hub id it was loaded from.")
    parent: str | None = Field(description="The model that an adapter belongs to; null for the model.")
    max_model_len: int | None = Field(description="Longest prompt plus output, in tokens; null while it is loaded.")


class ModelList(ResponseBody):
    """The served models."""

    object: Literal["list"]
    data: list[ModelCard]


class DeadReplica(ResponseBody):
    """A replica that is dead while others serve."""

    replica: int = Field(description="Its index.")
    reason: str = Field(description="Why it is dead.")


class Health(ResponseBody):
    """The engine's health."""

    status: str = Field(description="starting, ready, degraded (some replicas are dead), draining or dead.")
    reason: str | None = Field(description="Why the engine is dead.")
    dead_replicas: list[DeadReplica] = Field(description="Replicas that are dead while others serve.")


class Load(ResponseBody):
    """The server's load."""

    server_load: int = Field(description="Requests in progress.")


class Version(ResponseBody):
    """Version information."""

    version: str


class PolicyChange(Body):
    """A policy and its settings; missing ones get the recipe's values."""

    is_strict: ClassVar[bool] = True
    name: str
    settings: dict[str, Any] = Field({}, description="By name.")

    @field_validator("settings")
    @classmethod
    def check_settings(cls, settings: dict[str, Any]) -> dict[str, Any]:
        """They go to the engine in MessagePack, whose integers have 64 bits."""
        try:
            msgspec.msgpack.encode(settings)
        except OverflowError:
            raise ValueError("should have no integer of more than 64 bits") from None
        return settings


class AbortRequest(Body):
    """Which requests to abort: one, by the id of its response, or all."""

    is_strict: ClassVar[bool] = True
    request_id: str | None = None
    all: bool | None = None

    @model_validator(mode="after")
    def check(self) -> AbortRequest:
        """Exactly one of the two."""
        if (self.request_id is None) == (not self.all):
            raise ValueError('should have either a request_id or "all": true')
        return self


class Aborted(ResponseBody):
    """The aborted requests."""

    aborted: list[str]


AnyAnswer = dict[str, Any]
