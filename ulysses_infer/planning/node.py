"""`Node`: what a planner knows of a machine, read from a YAML file."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ulysses_infer.errors import ConfigError, kind_and_line
from ulysses_infer.planning.roofline import Link, Rate

FOLDER = Path(__file__).parent / "nodes"
PRODUCTS = ("bf16", "fp8", "fp8_block", "int4")
MOST_DEVICES = 1024


@dataclass(frozen=True)
class Host:
    """Seconds that the host adds to the device's, and what it takes to launch kernels one by one."""

    step_seconds: float
    """Per step."""
    hidden_tokens: int
    """Steps of at most this many tokens are scheduled ahead, and hide what the host does."""
    sequence_seconds: float
    """Per sequence of a step: scheduling, detokenisation, streaming."""
    request_seconds: float
    """Per request, before it is scheduled: HTTP and tokenisation."""
    launch_seconds: float
    """Per kernel of a step that is not captured in a CUDA graph."""
    max_captured_tokens: int
    """The largest step that is captured."""
    core_share: float = 0.0
    """Of the devices' time, what the service takes, beyond the other figures, where it runs on the ranks' own cores."""


@dataclass(frozen=True)
class HostLink:
    """Copies between the cache of a device and the tier of host memory and disk below it."""

    host: Link
    """Of each device."""
    disk: Link
    """Of a node; its devices share it."""
    staging_bytes: float
    """How much of what it stores a step does not wait for. 0: a CPU, where the tier takes memory of the cache."""


@dataclass(frozen=True)
class Node:
    """One node with equal devices. Times are in seconds, sizes in bytes."""

    name: str
    device: str
    num_devices: int
    memory_bytes: float
    """Of one device, as its driver reports it."""
    products: Mapping[str, Rate]
    """Matrix products by dtype: what long runs sustain."""
    experts: Mapping[str, Rate]
    prefill_attention: Rate
    decode_attention: Rate
    prefill_recurrent: Rate
    decode_recurrent: Rate
    elementwise: Rate
    all_reduce: Mapping[int, Link]
    """Fused one-shot or NCCL, whichever is faster for the size, by number of ranks."""
    all_reduce_small: Mapping[int, Link]
    all_to_all: Mapping[int, Link]
    all_gather: Mapping[int, Link]
    host: Host
    inter_node: Link
    """Between nodes, per device."""
    notes: tuple[str, ...]
    """Where the constants come from."""
    host_link: HostLink | None = None
    """None: not known, so that no tier below the cache can be planned."""


def known_nodes() -> list[str]:
    """The names that `load_node` takes."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def load_node(name: str) -> Node:
    """The node of a name, or of a YAML file of the same form. Raises `ConfigError` with the nearest name."""
    path = Path(name) if name.endswith((".yaml", ".yml")) else FOLDER / f"{name}.yaml"
    if not path.is_file():
        known = known_nodes()
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
        raise ConfigError(f"hardware {name!r} is unknown; the nearest is {near} (known: {', '.join(known)}, or a file)")
    try:
        return _node(path.stem, yaml.safe_load(path.read_text(encoding="utf-8")))
    except (OSError, KeyError, TypeError, ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"hardware file '{path}' is not valid: {kind_and_line(error)}") from error


def _node(name: str, values: Mapping[str, Any]) -> Node:
    def rate(kind: str) -> Rate:
        return _rate(values[kind])

    def links(kind: str) -> dict[int, Link]:
        return {int(ranks): _link(link) for ranks, link in values[kind].items()}

    return Node(
        name=name,
        device=str(values["device"]),
        num_devices=_num_devices(int(values["num_devices"])),
        memory_bytes=_above_zero("memory_bytes", float(values["memory_bytes"])),
        products={dtype: _rate(each) for dtype, each in values["products"].items()},
        experts={dtype: _rate(each) for dtype, each in values["experts"].items()},
        prefill_attention=rate("prefill_attention"),
        decode_attention=rate("decode_attention"),
        prefill_recurrent=rate("prefill_recurrent"),
        decode_recurrent=rate("decode_recurrent"),
        elementwise=rate("elementwise"),
        all_reduce=links("all_reduce"),
        all_reduce_small=links("all_reduce_small"),
        all_to_all=links("all_to_all"),
        all_gather=links("all_gather"),
        host=_host(values["host"]),
        inter_node=_link(values["inter_node"]),
        notes=tuple(map(str, values["sources"])),
        host_link=_host_link(values["host_link"]) if "host_link" in values else None,
    )


def _host(values: Mapping[str, Any]) -> Host:
    return Host(
        step_seconds=float(values["step_seconds"]),
        hidden_tokens=int(values["hidden_tokens"]),
        sequence_seconds=float(values["sequence_seconds"]),
        request_seconds=float(values["request_seconds"]),
        launch_seconds=float(values["launch_seconds"]),
        max_captured_tokens=int(values["max_captured_tokens"]),
        core_share=float(values.get("core_share", 0.0)),
    )


def _host_link(values: Mapping[str, Any]) -> HostLink:
    host, disk = (_link(values[name]) for name in ("host", "disk"))
    return HostLink(host, disk, float(values["staging_bytes"]))


def _num_devices(value: int) -> int:
    if not 0 < value <= MOST_DEVICES:
        raise ValueError(f"num_devices is {value}, not from 1 to {MOST_DEVICES}; --nodes N plans several nodes")
    return value


def _above_zero(name: str, value: float) -> float:
    if not value > 0:
        raise ValueError(f"{name} is {value:g}, not above 0")
    return value


def _link(values: Sequence[Any]) -> Link:
    """[seconds, bytes per second]"""
    latency, bandwidth = map(float, values)
    return Link(latency, _above_zero("the bandwidth of a link", bandwidth))


def _rate(values: Mapping[str, Any]) -> Rate:
    """`flops` or `bytes_per_second` may be missing: then the other one is the limit."""
    flops, bandwidth = (_above_zero(name, float(values.get(name, math.inf))) for name in ("flops", "bytes_per_second"))
    return Rate(flops, bandwidth, float(values["floor_seconds"]))
