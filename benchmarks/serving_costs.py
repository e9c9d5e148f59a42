"""What serving adds to the times of steps, fitted to probes: runs whose requests are none of those to be predicted.

A calibration runs in the engine alone. In a run the HTTP server, the client and the queries of step times share the
cores of the ranks: every streamed token and request takes processor time from them, and the rest of the service takes
a share of all the time. So steps in a run are slower than calibrated ones, on a CPU with as many ranks as cores.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from statistics import fmean

import numpy as np

from benchmarks.recorded_steps import LONGEST_GAP
from ulysses_infer.bench.compare.findings import ContenderRun
from ulysses_infer.bench.compare.protocols import LONE, ComparisonCase
from ulysses_infer.engine.policies import StaticPolicy
from ulysses_infer.parallel.layout import Mode
from ulysses_infer.planning.node import Host
from ulysses_infer.planning.replica import ReplicaSettings, SimulatedReplica
from ulysses_infer.planning.simulation import Fleet, SimulationResult, simulate
from ulysses_infer.planning.step_times import MeasuredStepTimes
from ulysses_infer.step_time.profile import Profile
from ulysses_infer.step_time.regression import fit_coefficients
from ulysses_infer.step_time.step_shape import StepShape

BINS_PER_DOUBLING = 2
Kind = tuple[bool, int]
"""Whether a step has prompts, and its tokens on a logarithmic scale."""


@dataclass(frozen=True)
class Probe:
    """A run in one mode."""

    case: ComparisonCase
    mode: Mode
    run: ContenderRun


class _LoggedStepTimes(MeasuredStepTimes):
    """Keeps the steps that a simulation asked for, with their seconds."""

    def __init__(self, profile: Profile, host: Host) -> None:
        super().__init__(profile, host)
        self.steps: list[tuple[StepShape, float]] = []

    def seconds(self, mode: Mode, shape: StepShape, is_ahead: bool = True) -> float:
        """See `StepTimes`."""
        seconds = super().seconds(mode, shape, is_ahead)
        self.steps.append((shape, seconds))
        return seconds


def fit_host(probes: Sequence[Probe], profile: Profile, settings: ReplicaSettings, host: Host) -> Host:
    """`host` with what serving adds: a share of the cores, seconds per step, per sequence and per request."""
    free = replace(host, step_seconds=0.0, sequence_seconds=0.0, request_seconds=0.0, core_share=0.0)
    rows, seconds, weights = [], [], []
    for probe in probes:
        for kind in steps_by_kind(probe, profile, settings, free):
            rows.append([kind.calibrated, 1.0, kind.sequences])
            seconds.append(kind.measured)
            weights.append(np.sqrt(kind.count))
    share, step, sequence = fit_coefficients(np.array(rows), np.array(seconds), np.array(weights)).tolist()
    found = replace(free, step_seconds=step, sequence_seconds=sequence, core_share=max(0.0, share - 1))
    return replace(found, request_seconds=_request_seconds(probes, profile, settings, found))


@dataclass(frozen=True)
class StepsOfKind:
    """Steps of a run beside the simulated ones of the same kind."""

    has_prompt: bool
    tokens: float
    """Mean of the simulated steps."""
    sequences: float
    """Mean of the simulated steps."""
    calibrated: float
    """Seconds, mean of the simulated steps."""
    measured: float
    """Seconds, mean of the run's steps, up to the start of the next one."""
    count: int
    """Steps of the run."""


def steps_by_kind(probe: Probe, profile: Profile, settings: ReplicaSettings, host: Host) -> list[StepsOfKind]:
    """The kinds of steps that both the run and its simulation have, those with the most measured time first."""
    _, times = _simulated(probe, profile, settings, host)
    expected: dict[Kind, list[tuple[int, int, float]]] = defaultdict(list)
    for shape, seconds in times.steps:
        kind = _kind(shape.num_tokens, shape.num_prefills > 0)
        expected[kind].append((shape.num_tokens, shape.num_sequences, seconds))
    found: dict[Kind, list[float]] = defaultdict(list)
    for step, after in pairwise(probe.run.steps):
        gap = max(0.0, after.start - step.start - step.seconds)  # starts are rounded
        if (step.sp, step.tp) == probe.mode and gap < LONGEST_GAP:
            found[_kind(step.tokens, step.tokens > step.decodes)].append(step.seconds + gap)
    kinds = []
    for kind, took in found.items():
        if kind in expected:
            tokens, sequences, calibrated = np.mean(expected[kind], axis=0).tolist()
            kinds.append(StepsOfKind(kind[0], tokens, sequences, calibrated, fmean(took), len(took)))
    return sorted(kinds, key=lambda kind: -kind.measured * kind.count)


def _kind(tokens: int, has_prompt: bool) -> Kind:
    return has_prompt, round(BINS_PER_DOUBLING * float(np.log2(tokens)))


def _simulated(
    probe: Probe, profile: Profile, settings: ReplicaSettings, host: Host
) -> tuple[SimulationResult, _LoggedStepTimes]:
    times = _LoggedStepTimes(profile, host)
    fleet = Fleet(1, lambda: SimulatedReplica(settings, times, StaticPolicy(probe.mode)))
    most = 1 if probe.case.kind == LONE else None
    return simulate(probe.case.rows, fleet, host.request_seconds, most), times


def _request_seconds(probes: Sequence[Probe], profile: Profile, settings: ReplicaSettings, host: Host) -> float:
    """How much later than predicted the first token of a lone request comes."""
    late = []
    for probe in probes:
        if probe.case.kind == LONE:
            result, _ = _simulated(probe, profile, settings, host)
            expected = fmean(request.ttft for request in result.requests)
            late.append(fmean(request.ttft for request in probe.run.requests) - expected)
    return max(0.0, fmean(late))
