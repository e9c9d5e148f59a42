"""What prevents a step from being captured is found on device `meta`, one fault at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from ulysses_infer.kernels.launch import launch
from ulysses_infer.worker.graphs.capture_checker import CaptureChecker, CaptureError, find_cause

META = torch.device("meta")


def rows() -> torch.Tensor:
    return torch.empty(4, 8, device=META)


def mask() -> torch.Tensor:
    return torch.empty(4, dtype=torch.bool, device=META)


def places() -> torch.Tensor:
    return torch.empty(2, dtype=torch.int64, device=META)


FAULTS: dict[str, tuple[Callable[..., Any], list[Callable[[], torch.Tensor]], str]] = {
    "item": (lambda x: x[0].item(), [places], "reads from the device"),
    "bool": (lambda x: 1 if x.any() else 0, [mask], "reads from the device"),
    "int": (lambda x: range(int(x.max())), [places], "reads from the device"),
    "nonzero": (torch.nonzero, [mask], "reads from the device"),
    "where": (torch.where, [mask], "reads from the device"),
    "equal": (torch.equal, [rows, rows], "reads from the device"),
    "unique": (torch.unique, [places], "reads from the device"),
    "select": (torch.masked_select, [rows, lambda: torch.empty(4, 8, dtype=torch.bool, device=META)], "reads from"),
    "counts": (torch.bincount, [places], "reads from the device"),
    "repeats": (lambda x: torch.repeat_interleave(x), [places], "reads from the device"),
    "read by a mask": (lambda x, y: x[y], [rows, mask], "reads a mask"),
    "write by a mask": (lambda x, y: x.index_put_([y], x[:2]), [rows, mask], "reads a mask"),
    "to the host": (lambda x: x.cpu(), [rows], "copies from meta to cpu through pageable memory"),
    "as a list": (lambda x: x.tolist(), [places], "copies from meta to cpu through pageable memory"),
    "from the host": (lambda x: x.copy_(torch.zeros(8)), [rows], "copies from cpu to meta through pageable memory"),
    "sent": (lambda: torch.zeros(8).to(META, non_blocking=True), [], "copies from cpu to meta through pageable memory"),
    "a list": (lambda: torch.tensor([1, 2], device=META), [], "copies a value of Python"),
    "a new list": (lambda x: x.new_tensor([1.0]), [rows], "copies a value of Python"),
    "an index of Python": (lambda x: x[[0, 1]], [rows], "copies an index of Python"),
    "an index on the host": (lambda x: x[torch.arange(2)], [rows], "mixes tensors of cpu and meta"),
    "a table on the host": (lambda x: torch.nn.functional.embedding(x, torch.zeros(9, 4)), [places], "mixes tensors"),
    "resize": (lambda x: x.resize_(64, 8), [rows], "gives a tensor other memory"),
    "an output that grows": (
        lambda x: torch.add(x, x, out=torch.empty(0, device=META)),
        [rows],
        "gives a tensor other memory",
    ),
    "other memory": (lambda x: x.set_(torch.empty(4, device=META)), [rows], "gives a tensor other memory"),
}


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_found_and_named(name: str, inference: bool) -> None:
    """Also in inference mode, where torch passes composite operators whole."""
    step, makers, reason = FAULTS[name]
    given = [make() for make in makers]

    with pytest.raises(CaptureError) as raised, torch.inference_mode(inference), CaptureChecker(META):
        step(*given)

    message = str(raised.value)
    assert reason in message
    assert "worker/graphs/test_capture_checker.py:" in message
    assert "\n" not in message


@pytest.mark.parametrize("inference", [False, True])
def test_what_can_be_captured_is_left_alone(inference: bool) -> None:
    x, table, where, seen = rows(), rows(), places(), mask()
    with torch.inference_mode(inference), CaptureChecker(META):
        x.add_(table).mul_(2.0)
        x[0] = 3.0
        x[:, :2].copy_(table[:, 2:4])
        x.index_put_([seen], torch.tensor(1.0))
        x.masked_fill_(seen[:, None], 0.0)
        torch.where(seen[:, None], x, 0.0)
        x[where], x.index_select(0, where), x.to(torch.bfloat16)
        torch.full((3,), 1.5, device=META), torch.arange(3, device=META)
        torch.repeat_interleave(where, output_size=5)
        x + torch.tensor(2.0)  # a number in host memory
        x.resize_(2, 8)
        torch.tensor([1, 2]).tolist()  # the host's own


def test_a_fault_names_the_operator_its_shapes_and_the_line_of_this_package() -> None:
    from ulysses_infer.attention.sinks import with_sinks

    on_host = torch.zeros(2)
    with pytest.raises(CaptureError) as raised, CaptureChecker(META):
        with_sinks(torch.empty(4, 2, 8, device=META), torch.empty(4, 2, device=META), on_host)
    message = str(raised.value)
    assert message.startswith("aten.sub.Tensor(float32[4, 2], float32[2]) mixes tensors of cpu and meta, at ")
    assert "ulysses_infer/attention/sinks.py:" in message


def test_allocations_are_counted_and_those_that_outlive_the_step_are_named() -> None:
    kept: list[torch.Tensor] = []
    x = rows()
    with CaptureChecker(META, records_allocations=True) as checker:
        doubled = x * 2
        doubled.view(-1).add_(1)
        kept.append(torch.empty(16, device=META))
        del doubled
    assert checker.bytes_by_operator == {"aten.mul.Tensor": 128, "aten.empty.memory_format": 64}
    (left,) = checker.kept()
    assert (left.operator, left.num_bytes) == ("aten.empty.memory_format", 64)
    assert "test_capture_checker.py:" in left.place


def test_nothing_is_checked_after_the_block() -> None:
    x = rows()
    with pytest.raises(CaptureError), CaptureChecker(META):
        x.cpu()
    with pytest.raises(NotImplementedError):
        x.cpu()
    assert torch.tensor([1], device=META).is_meta


def test_the_cause_of_a_failed_capture_is_found() -> None:
    x = rows()
    cause = find_cause(lambda: x.nonzero(), META)
    assert cause is not None
    assert cause.startswith("aten.nonzero.default(float32[4, 8]) reads from the device, at ")
    assert find_cause(lambda: x.add_(1), META) is None
    assert find_cause(lambda: x @ x, META) is None, "another error is no cause"


def test_a_kernel_of_ours_takes_no_tensor_of_the_host() -> None:
    def kernel() -> None: ...

    launch(kernel, (1,), rows(), 3, rows())
    with pytest.raises(RuntimeError, match="kernel of device meta is given a tensor of cpu"):
        launch(kernel, (1,), rows(), torch.zeros(3))
