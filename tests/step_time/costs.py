"""Simulated machines: the true time of a step in each mode, so that tests know the right answer."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from itertools import pairwise

from ulysses_infer.engine.calibration_points import Limits, design
from ulysses_infer.parallel.layout import Mode
from ulysses_infer.step_time.model import Measurement, StepTimeModel
from ulysses_infer.step_time.step_shape import StepShape

SP, TP = Mode(2, 1), Mode(1, 2)
MODES = [SP, TP]
Cost = Callable[[Mode, StepShape], float]
LIMITS = Limits(num_tokens=4096, num_sequences=64, context=8191, cached=32768)

TABLE = {
    "loopback": {1: (44.8, 69.5), 32: (57.8, 71.2), 128: (108, 107), 512: (252, 210), 2048: (981, 810)},
    "10 Gbit/s": {1: (48.2, 68.0), 32: (61.2, 76.4), 128: (99, 104), 512: (268, 201), 2048: (992, 803)},
    "1 Gbit/s": {1: (48.7, 66.0), 32: (60.2, 71.0), 128: (102, 106), 512: (311, 217), 2048: (1560, 1067)},
}
"""Tokens of a step: milliseconds in (TP, SP), as measured on two ranks with three kinds of links between them."""


def table_cost(link: str) -> Cost:
    """The table's times, straight lines between its rows."""
    rows = sorted(TABLE[link].items())

    def seconds(mode: Mode, shape: StepShape) -> float:
        column, tokens = MODES[::-1].index(mode), shape.num_tokens
        pairs = list(pairwise(rows))
        (low, first), (high, last) = next((p for p in pairs if tokens <= p[1][0]), pairs[-1])
        return (first[column] + (last[column] - first[column]) * (tokens - low) / (high - low)) / 1e3

    return seconds


def machine(mode: Mode, shape: StepShape) -> float:
    """TP reads weights faster, SP sends less; attention costs the same in both."""
    weights, token = (0.012, 90e-6) if mode == SP else (0.007, 150e-6)
    computing = token * shape.num_tokens
    attention = 4e-7 * (shape.decode_context + shape.prefill_context) + 1e-8 * (shape.fresh_pairs + shape.past_pairs)
    return max(weights, computing) + 0.2 * min(weights, computing) + attention + 3e-5 * shape.num_sequences + 0.001


def measured(cost: Cost, draw: random.Random | None = None, noise: float = 0.0) -> list[Measurement]:
    """The points of a calibration with a machine's times."""
    shapes = {point.shape for point in design(LIMITS)}
    return [
        Measurement(mode, shape, cost(mode, shape) * (1.0 if draw is None else draw.lognormvariate(0, noise)))
        for mode in MODES
        for shape in sorted(shapes)
    ]


def model_of(measurements: Iterable[Measurement]) -> StepTimeModel:
    """A model that has learned them."""
    model = StepTimeModel(MODES)
    model.learn(measurements)
    return model


def some_step(draw: random.Random) -> StepShape:
    """A step as in traffic."""
    contexts = [draw.randrange(1, 3000)] * draw.choice([0, 1, 4, 20, 60])
    chunk = draw.choice([0, 0, 16, 100, 600, 2000]) or (0 if contexts else 50)
    return StepShape.of(contexts, [(draw.choice([0, 0, 1500]), chunk)] if chunk else [])
