"""What a recurrent layer is made of: projections in, weights per head or channel, a projection out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from ulysses_infer.cache.states import StateCache
from ulysses_infer.errors import ConfigError
from ulysses_infer.model.recurrent.runs import Run
from ulysses_infer.parallel.layout import Span, divisors
from ulysses_infer.parallel.sharding import Part, Sharding


class InnerForm(Protocol):
    """Another form of the inner part of a layer."""

    def __call__(self, states: StateCache, layer: int, run: Run, inputs: Sequence[torch.Tensor]) -> torch.Tensor:
        """inputs: each [T, own features]; returns [n * length, own features] of the run, and updates its states."""
        ...


@dataclass(frozen=True)
class Owner:
    """The head shard of a rank, whose heads and channels it owns in every mode."""

    shard: int
    world_size: int

    def span(self, part: Part) -> Span:
        """Own features of `part`."""
        return part.span(self.shard, self.world_size)

    def spans(self, sharding: Sharding) -> list[Span]:
        """Own features of `sharding`, part by part."""
        return sharding.spans(self.shard, self.world_size)


@dataclass(frozen=True)
class Input:
    """A projection whose outputs the inner part of the layer reads."""

    name: str
    """Its name inside the layer; "" is the input of the layer itself."""
    sharding: Sharding
    """Of its output features."""
    before: str | None = None
    """The layer that it is applied to the output of; every rank has it whole."""
    scale: str | None = None
    """The attribute, if there is one, that its input is multiplied by."""


@dataclass(frozen=True)
class OwnWeight:
    """A weight or buffer of the inner part, of which a rank keeps its own heads or channels only, in every mode."""

    name: str
    sharding: Sharding
    dimension: int = 0


@dataclass(frozen=True)
class Rule:
    """How a recurrent layer is cut by head shard."""

    inputs: tuple[Input, ...]
    output: str
    """Name of the output projection inside the layer; "" if it has none."""
    output_part: Part
    """The features of the inner part's result."""
    weights: tuple[OwnWeight, ...] = ()
    counts: Mapping[str, tuple[Part, ...]] = field(default_factory=dict)
    """Attributes that hold a number of heads or features, and what they count."""
    units: Mapping[str, tuple[int, bool]] = field(default_factory=dict)
    """What must divide over the ranks, in words: how many, and whether neighbouring ranks may share one."""
    replaced: Callable[[Any, Owner], Mapping[str, Any]] | None = None
    """Makes what the forward sees instead of some attributes, from the layer and its `Owner`."""
    functions: Mapping[str, Callable[..., Any]] = field(default_factory=dict)
    """Functions to call instead of those that the forward's module has under these names.

    They get the view of the layer and the other function first.
    """
    forward: Callable[..., Any] | None = None
    """Instead of the forward of the layer's class."""
    native: Callable[[Any, torch.dtype, Owner], InnerForm | None] | None = None
    """Makes the inner part's form in C from the layer, with this rank's heads and weights, the dtype of its inputs and
    its `Owner`; None if it does not fit."""
    returns_pair: bool = False
    """Whether the model expects a second result, which it does not use."""


def convolution(name: str, sharding: Sharding) -> tuple[OwnWeight, OwnWeight]:
    """The weights of a convolution with one filter per channel."""
    return OwnWeight(f"{name}.weight", sharding), OwnWeight(f"{name}.bias", sharding)


RuleMaker = Callable[[Any], Rule]


def check_units(module: Any, units: Mapping[str, tuple[int, bool]], world_size: int) -> None:
    """Raise `ConfigError`, listing valid world sizes, unless all `units` (see `Rule`) divide over the ranks."""
    if _units_fit(units, world_size):
        return
    most = max(count for count, _ in units.values())
    fitting = [size for size in divisors(most) if _units_fit(units, size)]
    what = " and ".join(f"{count} {name}" for name, (count, _) in units.items())
    raise ConfigError(
        f"{what} of {type(module).__name__} do not divide over sp * tp = {world_size} ranks; "
        f"use sp * tp = {', '.join(map(str, fitting))}"
    )


def _units_fit(units: Mapping[str, tuple[int, bool]], world_size: int) -> bool:
    return all(count % world_size == 0 or (shared and world_size % count == 0) for count, shared in units.values())
