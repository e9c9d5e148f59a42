"""Types of the routes for reinforcement learning, as in vLLM."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

from pydantic import Field

from ulysses_infer.server.http.protocol.common import Body, ResponseBody


class AbortIds(Body):
    """Requests to end."""

    is_strict: ClassVar[bool] = True
    request_ids: list[str] | None = Field(None, description="Ids of responses; null or empty: all.")


class InitInfo(Body):
    """The trainer's process group."""

    master_address: str
    master_port: Annotated[int, Field(ge=1, le=65535)]
    rank_offset: Annotated[int, Field(ge=1, le=2**31 - 1)] = 1
    world_size: Annotated[int, Field(ge=2, le=2**31 - 1)]
    timeout: Annotated[float, Field(gt=0, le=86400)] = Field(300.0, description="Seconds.")


class InitTransfer(Body):
    """Join the trainer's process group."""

    is_strict: ClassVar[bool] = True
    init_info: InitInfo


class UpdateInfo(Body):
    """Tensors that the trainer broadcasts in this order, or a folder with all weights."""

    names: list[str] | None = None
    dtype_names: list[str] | None = None
    shapes: list[list[Annotated[int, Field(ge=0, le=2**31 - 1)]]] | None = None
    path: str | None = None


class UpdateWeights(Body):
    """Receive new weights."""

    is_strict: ClassVar[bool] = True
    update_info: UpdateInfo


class WeightVersion(Body):
    """End an update."""

    is_strict: ClassVar[bool] = True
    weight_version: Annotated[str, Field(max_length=256)] | None = None


class NewVersion(Body):
    """Name the version of the weights."""

    is_strict: ClassVar[bool] = True
    new_version: Annotated[str, Field(max_length=256)]


class Paused(ResponseBody):
    """Whether steps run."""

    is_paused: bool


class Done(ResponseBody):
    """What was done."""

    status: str


class Sleeping(ResponseBody):
    """Whether memory is freed."""

    is_sleeping: bool


class WorldSize(ResponseBody):
    """The number of ranks."""

    world_size: int


class WeightInfo(ResponseBody):
    """The version of the weights."""

    weight_version: str | None


class AbortCount(ResponseBody):
    """How many requests were ended."""

    status: str
    aborted: int
    request_ids: list[Any]
