"""Step times of the simulation: measured on this machine, or predicted for hardware by name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from ulysses_infer.engine.calibration_points import Limits, design
from ulysses_infer.parallel.layout import Mode
from ulysses_infer.planning.node import Host
from ulysses_infer.planning.operations import (
    EAGER_KERNELS_PER_LAYER,
    KERNELS_PER_LAYER,
    Operation,
    StepOperations,
)
from ulysses_infer.step_time.model import Measurement, StepTimeModel
from ulysses_infer.step_time.profile import Profile
from ulysses_infer.step_time.step_shape import StepShape


class StepTimes(Protocol):
    """Predicts steps. The simulation reads nothing else of the hardware."""

    modes: tuple[Mode, ...]
    request_seconds: float
    """From a request's arrival until it can be scheduled."""

    def seconds(self, mode: Mode, shape: StepShape, is_ahead: bool = True) -> float:
        """Seconds from the start of a step until its tokens are known. is_ahead: whether the next step can be scheduled
        before."""
        ...


class MeasuredStepTimes:
    """Interpolates a stored profile, with the model that the adaptive policy uses, and adds what the host does between
    steps."""

    def __init__(self, profile: Profile, host: Host) -> None:
        self.modes = tuple(dict.fromkeys(measurement.mode for measurement in profile.measurements))
        self.request_seconds, self.host = host.request_seconds, host
        self._model = StepTimeModel(self.modes)
        self._model.learn(profile.measurements)

    def seconds(self, mode: Mode, shape: StepShape, is_ahead: bool = True) -> float:
        """See `StepTimes`. Raises KeyError for a mode that the profile lacks."""
        device = dict(zip(self.modes, self._model.predict(shape), strict=True))[mode]
        return with_host(self.host, shape, device, is_ahead)


class AnalyticStepTimes:
    """Sums the operations of a step (`StepOperations`) and adds the host."""

    def __init__(self, operations: StepOperations, modes: Sequence[Mode]) -> None:
        self.operations, self.modes = operations, tuple(modes)
        self.request_seconds = operations.node.host.request_seconds

    def device_seconds(self, mode: Mode, shape: StepShape) -> float:
        """Of all operations, or of launching them one by one if that takes longer."""
        return max(self.operations.seconds(mode, shape), self._launch_seconds(shape))

    def seconds(self, mode: Mode, shape: StepShape, is_ahead: bool = True) -> float:
        """See `StepTimes`."""
        return with_host(self._host, shape, self.device_seconds(mode, shape), is_ahead)

    def explain(self, mode: Mode, shape: StepShape, is_ahead: bool = True) -> list[Operation]:
        """The operations, the most expensive first, and what the host adds."""
        found = sorted(self.operations.of(mode, shape), key=lambda operation: -operation.total)
        rest = max(0.0, self.seconds(mode, shape, is_ahead) - sum(operation.total for operation in found))
        return [*found, Operation("host", rest, 1, "host")]

    @property
    def _host(self) -> Host:
        return self.operations.node.host

    def _launch_seconds(self, shape: StepShape) -> float:
        captured = shape.num_tokens <= self._host.max_captured_tokens
        captured &= not (self.operations.sizes.num_later_layers and shape.num_prefills)  # see docs/models.md, SwiftKV
        kernels = KERNELS_PER_LAYER if captured else EAGER_KERNELS_PER_LAYER
        return 0.0 if captured else kernels * self.operations.sizes.num_layers * self._host.launch_seconds


def with_host(host: Host, shape: StepShape, device: float, is_ahead: bool = True) -> float:
    """Seconds of a step that takes `device` seconds there: for short steps, the longer of device and host counts if the
    next one is scheduled ahead."""
    own, device = host.step_seconds + host.sequence_seconds * shape.num_sequences, device * (1 + host.core_share)
    return max(device, own) if is_ahead and shape.num_tokens <= host.hidden_tokens else device + own


def profile_of(times: StepTimes, limits: Limits) -> Profile:
    """What a calibration would measure if steps took these times: the start of the adaptive policy."""
    points = [point.shape for point in design(limits)]
    measurements = [Measurement(mode, shape, times.seconds(mode, shape)) for mode in times.modes for shape in points]
    return Profile({"source": "plan"}, measurements)
