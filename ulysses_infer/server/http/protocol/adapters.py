"""Types of the routes that load and unload LoRA adapters, as in vLLM."""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Field

from ulysses_infer.server.http.protocol.common import Body


class LoadAdapter(Body):
    """Serve an adapter."""

    is_strict: ClassVar[bool] = True
    lora_name: Annotated[str, Field(min_length=1, max_length=256)] = Field(description="What requests name as model.")
    lora_path: Annotated[str, Field(min_length=1)] = Field(description="A folder that PEFT saved, or a hub id.")
    load_inplace: bool | None = Field(None, description="It may replace the adapter of this name.")


class UnloadAdapter(Body):
    """Serve an adapter no longer."""

    is_strict: ClassVar[bool] = True
    lora_name: str
