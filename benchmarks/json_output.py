"""JSON documents under a schema with long literal keys, with and without speculation."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from ulysses_infer import SamplingParams
from ulysses_infer.bench.workload import Sample, sample_of
from ulysses_infer.inference import InferenceEngine
from ulysses_infer.outputs import RequestOutput

AIM = 1.5
AT_ONCE = 8
COMPARED = {1: 7, AT_ONCE: 5}
"""Documents at once: rounds that are written with and without speculation. The first one warms up."""
KEYS: dict[str, dict[str, Any]] = {
    "is_the_customer_entitled_to_a_full_refund": {"type": "boolean"},
    "estimated_number_of_working_days_until_delivery": {"type": "integer", "minimum": 1, "maximum": 30},
    "preferred_language_of_the_correspondence": {"enum": ["english", "german", "french"]},
    "has_the_order_been_shipped_to_the_customer": {"type": "boolean"},
    "category_of_the_product_that_was_returned": {"enum": ["book", "phone", "shoes", "lamp"]},
    "must_a_supervisor_confirm_this_decision": {"type": "boolean"},
}
SCHEMA = {"type": "object", "properties": KEYS, "required": [*KEYS], "additionalProperties": False}

SHOWN = {key: wanted["enum"][0] if "enum" in wanted else wanted.get("minimum", True) for key, wanted in KEYS.items()}
EXAMPLE = f"Order 0: a customer has a question. The decision as JSON:\n{json.dumps(SHOWN, separators=(',', ':'))}\n\n"
"""A prompt usually shows the form of the answer; without it a model spells keys in other tokens than the usual ones."""


def is_valid(text: str) -> bool:
    """Whether `text` is a document of `SCHEMA`."""
    try:
        document = json.loads(text)
    except ValueError:
        return False
    return (
        isinstance(document, dict) and [*document] == [*KEYS] and all(_fits(document[key], KEYS[key]) for key in KEYS)
    )


def _fits(value: Any, wanted: dict[str, Any]) -> bool:
    if "enum" in wanted:
        return value in wanted["enum"]
    if wanted["type"] == "boolean":
        return isinstance(value, bool)
    return type(value) is int and wanted["minimum"] <= value <= wanted["maximum"]


class JsonStudy:
    """Writes documents, one alone and a few at once; some of them are written without speculation too."""

    def __init__(self, number: int, compared: Mapping[int, int] = COMPARED) -> None:
        """number: documents with speculation; compared: see `COMPARED`."""
        self._number, self._compared = number, compared
        self._pairs: dict[int, list[dict[bool, Sample]]] = {at_once: [] for at_once in compared}
        self._num_valid = self._num_written = 0

    def run(self, engine: InferenceEngine, speculate: Callable[[bool], None], is_over: Callable[[], bool]) -> None:
        """speculate: switches speculation on or off, and empties the prefix cache, so that none finds another's."""
        for at_once, is_counted, order in self._rounds():
            first, pair = self._num_written, {}
            for chosen in order:
                if is_over():
                    return
                speculate(chosen)
                outputs = write(engine, range(first, min(first + at_once, self._number)))
                pair[chosen] = sample_of(outputs)
                if chosen:
                    self._num_written += len(outputs)
                    self._num_valid += sum(is_valid(output.outputs[0].text) for output in outputs)
            if is_counted:
                self._pairs[at_once].append(pair)

    def _rounds(self) -> Iterator[tuple[int, bool, tuple[bool, ...]]]:
        """(documents at once, whether its speed counts, with speculation or without in turn) until all are written."""
        for at_once, rounds in self._compared.items():
            for number in range(rounds):
                if self._num_written < self._number:
                    yield at_once, number > 0, (True, False) if number % 2 else (False, True)
        while self._num_written < self._number:
            yield AT_ONCE, False, (True,)

    def lines(self) -> list[str]:
        """What was aimed at, and what came out."""
        return [self._line(at_once) for at_once in self._compared]

    def _line(self, at_once: int) -> str:
        what, pairs = f"JSON under a schema, {at_once} at once", self._pairs[at_once]
        if not pairs:
            return f"not measured  {what}"
        without, speculated = (_tokens_per_second([pair[chosen] for pair in pairs]) for chosen in (False, True))
        ratio = speculated / without
        is_met = ratio >= AIM and self._num_valid == self._num_written == self._number
        return (
            f"{'met' if is_met else 'MISSED':12}  {what}: {speculated:.1f} instead of {without:.1f} tokens/s, "
            f"{ratio:.2f}x, aim: at least {AIM}x; {self._num_valid} of {self._number} valid"
        )


def _tokens_per_second(samples: Sequence[Sample]) -> float:
    return sum(each.output_tokens for each in samples) / sum(each.seconds for each in samples)


def write(engine: InferenceEngine, numbers: range) -> list[RequestOutput]:
    """Documents with these seeds."""
    prompts = [f"{EXAMPLE}Order {number}: a customer has a question. The decision as JSON:\n" for number in numbers]
    params = [
        SamplingParams(
            temperature=0.7,
            seed=number,
            max_tokens=400,
            structured_outputs={"json": SCHEMA, "disable_any_whitespace": True},
        )
        for number in numbers
    ]
    return engine.generate(prompts, params)
