"""Speculation in virtual time: the engine's own, with a proposer that is right as often as assumed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ulysses_infer.config import SpeculationConfig
from ulysses_infer.config.speculation import AUTO
from ulysses_infer.engine.batch import Batch
from ulysses_infer.engine.policies import Policy
from ulysses_infer.engine.request import Request
from ulysses_infer.engine.speculation.draft_planner import DraftPlanner, Prediction
from ulysses_infer.engine.speculation.proposer import NOTHING, Draft, Query
from ulysses_infer.engine.speculation.speculation import Speculation
from ulysses_infer.engine.speculation.step_times import StepTimes as PolicyStepTimes
from ulysses_infer.errors import ConfigError
from ulysses_infer.parallel.layout import Mode
from ulysses_infer.planning.options import DEFAULT_ACCEPTANCE, FORM
from ulysses_infer.step_time.model import Measurement
from ulysses_infer.step_time.step_shape import StepShape

METHODS = ("ngram", "suffix")  # drafts of a model would take time of the devices
WORD = 1 << 64


@dataclass(frozen=True)
class AssumedSpeculation:
    """How drafts are made, and how good they are assumed to be."""

    config: SpeculationConfig
    acceptance: float = DEFAULT_ACCEPTANCE
    """The chance that a drafted token is right if those before it are."""
    coverage: float = 1.0
    """The share of decode steps of a request for which something is proposed."""

    def __str__(self) -> str:
        count = "up to 16 tokens" if self.config.num_tokens == AUTO else f"{self.config.num_tokens} tokens"
        covered = "" if self.coverage == 1 else f" in {self.coverage:.0%} of the steps of a request"
        return f"{self.config.method}, {count}{covered}, each right with a chance of {self.acceptance:.0%} (assumed)"


def parse_speculation(text: str) -> AssumedSpeculation:
    """`ngram:acceptance=0.6,num_tokens=4`. Raises `ConfigError` with what is wrong."""
    method, _, rest = text.partition(":")
    if method not in METHODS:
        raise ConfigError(f"--speculation {text}: method {method!r} is not one of {', '.join(METHODS)}; give {FORM}")
    config, shares = SpeculationConfig(method=method), {"acceptance": DEFAULT_ACCEPTANCE, "coverage": 1.0}
    for setting in filter(None, rest.split(",")):
        name, _, value = setting.partition("=")
        if name == "num_tokens":
            config.num_tokens = _count(text, value)
        elif name in shares:
            shares[name] = _share(text, name, value)
        else:
            raise ConfigError(f"--speculation {text}: {setting!r} is unknown; give {FORM}")
    return AssumedSpeculation(config, **shares)


def _count(text: str, value: str) -> int | str:
    if value == AUTO or (value.isdecimal() and int(value) > 0):
        return AUTO if value == AUTO else int(value)
    raise ConfigError(f"--speculation {text}: num_tokens={value} is neither auto nor a number of at least 1")


def _share(text: str, name: str, value: str) -> float:
    try:
        share = float(value)
    except ValueError:
        share = -1.0
    if not 0 <= share <= 1:
        raise ConfigError(f"--speculation {text}: {name}={value} is not a number from 0 to 1")
    return share


class AssumedProposer:
    """Implements `Proposer` with tokens whose value does not matter; `accepted` says how many of them are right.

    Whether a token can be foreseen is a function of its request and position, so it is the same for every layout,
    policy and number of drafts.
    """

    def __init__(self, assumed: AssumedSpeculation) -> None:
        self._assumed = assumed

    def propose(self, queries: Sequence[Query]) -> list[Draft]:
        """See `Proposer.propose`. Confidences are 1: the engine learns from its own observations."""
        return [self._propose(query.request, query.most) for query in queries]

    def _propose(self, request: Request, most: int) -> Draft:
        if uniform(request.index, -request.num_tokens) >= self._assumed.coverage:
            return NOTHING
        return Draft((0,) * most, (1.0,) * most)

    def accepted(self, batch: Batch) -> dict[int, int]:
        """How many drafted tokens of each request are right."""
        return {item.request.index: self._num_right(item.request, len(item.drafts)) for item in batch.decodes}

    def _num_right(self, request: Request, num_drafted: int) -> int:
        first, chance = request.num_tokens, self._assumed.acceptance
        places = range(first, first + num_drafted)
        return next((place - first for place in places if uniform(request.index, place) >= chance), num_drafted)

    def forget(self, request: Request) -> None:
        """See `Proposer.forget`."""
        return


def uniform(index: int, position: int) -> float:
    """A number in [0, 1) that is a function of both. Source: Steele, Lea and Flood, "Fast splittable pseudorandom
    number generators", OOPSLA 2014 (SplitMix64)."""
    word = (index * 0xD1B54A32D192ED03 + position * 0x9E3779B97F4A7C15) % WORD
    word = ((word ^ (word >> 30)) * 0xBF58476D1CE4E5B9) % WORD
    word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) % WORD
    return (word ^ (word >> 31)) / WORD


class SimulatedSpeculation:
    """The engine's `Speculation` of one replica."""

    def __init__(
        self,
        assumed: AssumedSpeculation,
        policy: Policy,
        modes: Sequence[Mode],
        predicted: Sequence[Measurement],
        max_batched_tokens: int,
    ) -> None:
        """predicted: step times that it starts from, as after a calibration."""
        self._proposer = AssumedProposer(assumed)
        self._times = PolicyStepTimes(modes, predicted, lambda: policy)
        self._own = Speculation(assumed.config, _no_grammar, self._times, max_batched_tokens, self._proposer)
        self.draft = self._own.draft
        self.is_due = self._own.is_due
        self.stats = self._own.stats

    def accept(self, batch: Batch, mode: Mode, seconds: float) -> dict[int, int]:
        """Learn from a step that took `seconds`; returns how many drafted tokens it accepts, by request index."""
        accepted = self._proposer.accepted(batch)
        self._times.observe(batch, mode, seconds)
        return accepted

    def observe(self, batch: Batch, accepted: dict[int, int], finished: Sequence[Request]) -> None:
        """The scheduler has applied the step; the requests `finished` have ended."""
        self._own.observe(batch, accepted)
        for request in finished:
            self._own.forget(request)


def _no_grammar(request: Request) -> None:
    return None


def lone_draft(assumed: AssumedSpeculation, seconds: Callable[[StepShape], float], mode: Mode, context: int) -> int:
    """How many tokens the engine drafts for one request that decodes alone, after `context` tokens."""
    most = assumed.config.max_drafted
    if assumed.config.num_tokens != AUTO:
        return most
    planner = DraftPlanner(lambda shape: Prediction(mode, seconds(shape), is_measured=True))
    gains = [assumed.acceptance**number for number in range(1, most + 1)]
    return planner.plan({0: gains}, {0: context}, [], most).counts.get(0, 0)
