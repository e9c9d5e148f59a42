"""`num_tokens: auto` against the best fixed number, in virtual time: real chooser, assumed step times and drafts."""

import math
from dataclasses import replace

import pytest

from ulysses_infer.config import PolicyConfig, SpeculationConfig
from ulysses_infer.engine.batch import Batch, ScheduledRequest
from ulysses_infer.engine.policies import AdaptivePolicy
from ulysses_infer.engine.request import Request
from ulysses_infer.engine.speculation.speculation import Speculation
from ulysses_infer.engine.speculation.step_times import StepTimes
from ulysses_infer.parallel.layout import Mode
from ulysses_infer.planning.speculation import AssumedProposer, AssumedSpeculation, uniform
from ulysses_infer.sampling_params import SamplingParams
from ulysses_infer.step_time.model import Measurement
from ulysses_infer.step_time.step_shape import StepShape

MODE, PROMPT, OUTPUT = Mode(1, 1), 64, 96
NOISE = 0.02
NONE, AUTO = SpeculationConfig(), SpeculationConfig(method="ngram")
FIXED = [replace(AUTO, num_tokens=count) for count in (1, 2, 4, 8, 16)]


def reading(rows):
    """Weights are read once, then each row costs."""
    return max(60.0, 58 + 1.2 * rows)


def proportional(rows):
    return 10 + 1.5 * rows


def tiled(rows):
    """Rows are computed in tiles of 16; few rows cost little each."""
    return 15 + 0.8 * min(rows, 16) + 20 * max(0, math.ceil((rows - 16) / 16))


class VirtualRun:
    """Requests that are decoded together, again and again; time is what `milliseconds` of the rows says."""

    def __init__(self, chosen, milliseconds, chance):
        self.milliseconds, self.steps = milliseconds, 0
        self.policy = AdaptivePolicy([MODE], PolicyConfig(name="adaptive"))
        measured = [Measurement(MODE, StepShape.of([64] * n, []), milliseconds(n) / 1e3) for n in (1, 2, 8, 16)]
        chunks = [Measurement(MODE, StepShape.of([], [(0, n)]), milliseconds(n) / 1e3) for n in (8, 32, 128)]
        self.policy.model.learn(measured + chunks)
        self.proposer = AssumedProposer(AssumedSpeculation(AUTO, chance))
        times = StepTimes([MODE], [], lambda: self.policy)
        self.speculation = Speculation(chosen, lambda request: None, times, 1024, self.proposer)
        self.is_on, self.drafted, self.seconds, self.outputs = chosen.is_enabled, 0, 0.0, 0

    def decode(self, first, count):
        """Decode `count` new requests, numbered from `first`."""
        running = [decoding(index) for index in range(first, first + count)]
        while running:
            self.step(running)
            for request in [each for each in running if each.num_output_tokens >= OUTPUT]:
                running.remove(request)
                self.speculation.forget(request)

    def step(self, running):
        drafts = self.speculation.draft(running, None) if self.is_on else {}
        batch = Batch([scheduled(each, drafts.get(each.index, ())) for each in running], [])
        self.steps += 1
        seconds = self.milliseconds(batch.num_tokens) * (1 + NOISE * uniform(batch.num_tokens, self.steps)) / 1e3
        self.policy.observe(batch, self.policy.decide(batch), seconds)
        accepted = {index: count for index, count in self.proposer.accepted(batch).items() if index in drafts}
        for request in running:
            gained = 1 + accepted.get(request.index, 0)
            request.output_token_ids += [0] * gained
            request.num_computed_tokens += gained
            self.outputs += gained
        self.drafted += sum(map(len, drafts.values()))
        self.seconds += seconds
        self.speculation.observe(batch, accepted)


def decoding(index):
    request = Request(f"r{index}", index, [1] * PROMPT, SamplingParams(max_tokens=OUTPUT), 0.0)
    request.output_token_ids.append(0)
    request.num_computed_tokens, request.length_limit = PROMPT, PROMPT + OUTPUT
    return request


def scheduled(request, drafts):
    return ScheduledRequest(request, request.num_computed_tokens, 1 + len(drafts), [], True, drafts=drafts)


def speed(chosen, milliseconds, chance, count, warm=2, rounds=3):
    """Output tokens per second, after some rounds of requests."""
    run = VirtualRun(chosen, milliseconds, chance)
    for turn in range(warm):
        run.decode(turn * count, count)
    run.seconds, run.outputs = 0.0, 0
    for turn in range(warm, warm + rounds):
        run.decode(turn * count, count)
    return run.outputs / run.seconds


def share_of_best(milliseconds, chance, count, **kwargs):
    fixed = [speed(each, milliseconds, chance, count, **kwargs) for each in (NONE, *FIXED)]
    return speed(AUTO, milliseconds, chance, count, **kwargs) / max(fixed)


@pytest.mark.parametrize(("milliseconds", "chance", "count"), [(tiled, 0.8, 1), (reading, 0.95, 4)])
def test_auto_is_nearly_as_fast_as_the_best_fixed_number(milliseconds, chance, count):
    assert share_of_best(milliseconds, chance, count) >= 0.97


@pytest.mark.thorough
@pytest.mark.parametrize("count", [1, 4, 16])
@pytest.mark.parametrize("chance", [0.0, 0.3, 0.6, 0.8, 0.95])
@pytest.mark.parametrize("milliseconds", [reading, proportional, tiled])
def test_auto_is_never_much_slower_than_the_best_fixed_number(milliseconds, chance, count):
    """The fixed number is the best of six in hindsight."""
    assert share_of_best(milliseconds, chance, count, warm=4 if count < 16 else 2) >= 0.91


def test_a_request_whose_drafts_are_wrong_loses_little():
    run, plain = VirtualRun(AUTO, tiled, 0.0), VirtualRun(NONE, tiled, 0.0)
    for each in (run, plain):
        each.decode(0, 1)
    assert run.drafted > 0
    assert run.seconds <= 1.03 * plain.seconds
