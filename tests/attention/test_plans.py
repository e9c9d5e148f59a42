"""Plans on the host: what their copies wait for, and where their inputs are."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from tests.attention.test_cuda_adapters import make_metadata
from tests.attention.test_flashinfer_latent import Loop, inputs
from ulysses_infer.attention.backend import AttentionOptions
from ulysses_infer.attention.flashinfer import FlashInferAttention
from ulysses_infer.attention.flashinfer_latent import FlashInferLatentAttention
from ulysses_infer.attention.plans import HostArrays, PlanOrder

META = torch.device("meta")


class Recorder:
    """A wrapper of flashinfer that keeps the arguments of its plans and attends to nothing."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        self.arguments: dict[str, Any] = {}

    def plan(self, *arguments: Any, **named: Any) -> None:
        self.arguments = {**{str(place): value for place, value in enumerate(arguments)}, **named}

    def run(self, *arguments: Any, **named: Any) -> torch.Tensor:
        return torch.empty(0)

    def devices(self) -> list[str]:
        tensors = [value for value in self.arguments.values() if isinstance(value, torch.Tensor)]
        assert all(tensor.dtype == torch.int32 for tensor in tensors)
        return [tensor.device.type for tensor in tensors]


def test_a_plan_waits_for_the_copy_of_the_last_of_its_wrapper() -> None:
    log: list[str] = []
    events = iter("ab")

    def make_event() -> Any:
        name = next(events)
        return SimpleNamespace(
            record=lambda: log.append(f"record {name}"), synchronize=lambda: log.append(f"wait {name}")
        )

    order = PlanOrder(make_event)
    for wrapper in ("one", "one", "two", "one"):
        order.run(wrapper, lambda: log.append("plan"))
    assert log == [
        *("plan", "record a"),
        *("wait a", "plan", "record a"),
        *("plan", "record b"),
        *("wait a", "plan", "record a"),
    ]


def test_every_plan_of_latents_runs_in_order() -> None:
    planned: list[Any] = []

    class Order(PlanOrder):
        def run(self, wrapper: Any, plan: Any) -> None:
            planned.append(wrapper)
            plan()

    library = SimpleNamespace(mla=SimpleNamespace(BatchMLAPagedAttentionWrapper=Recorder))
    backend = FlashInferLatentAttention(library, torch.device("cpu"), Loop())
    backend._order = Order(None)
    for _ in range(2):
        backend.attend(*inputs("decodes"), AttentionOptions(0.4))
    (wrapper,) = backend._wrappers.values()
    assert planned == [wrapper] * 2
    assert wrapper.devices() == ["cpu"] * 4


def test_page_indices_are_on_the_device_before_the_library_would_wait_to_copy_them() -> None:
    """The library copies indices on the host into a graph's buffer synchronously, and needs the other arrays there."""
    library = SimpleNamespace(BatchDecodeWithPagedKVCacheWrapper=Recorder, BatchPrefillWithPagedKVCacheWrapper=Recorder)
    backend = FlashInferAttention(library, META)
    cache = torch.empty(8, 4, 2, 8, device=META), torch.empty(8, 4, 2, 8, device=META)
    for lengths, devices in (((1, 1), ["cpu", "meta", "cpu"]), ((3, 1), ["cpu", "cpu", "meta", "cpu"])):
        metadata = make_metadata(lengths, (3, 9))
        backend.attend(torch.empty(sum(lengths), 4, 8, device=META), *cache, metadata, AttentionOptions(0.4))
        assert metadata.kernel is not None
        (wrapper,) = metadata.kernel.plans.values()
        assert wrapper.devices() == devices


def test_inputs_of_plans_are_copies() -> None:
    array = np.arange(4)
    tensor = HostArrays(torch.device("cpu")).on_host(array)
    array[:] = 0
    assert tensor.tolist() == [0, 1, 2, 3]
