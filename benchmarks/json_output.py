"""JSON documents under a schema with long literal keys, with and without speculation."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from ulysses_infer import SamplingParams
from ulysses_infer.bench.workload import Sample, sample_of
from ulysses_infer.inference import InferenceEngine
from ulysses_infer.outputs import RequestOutput

AT_ONCE = 8
AIM = 1.5
ROUNDS_WITHOUT = 4  # of every round with speculation, at most this many are repeated without
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
    """Writes documents, a few at once; some of them are written without speculation too."""

    def __init__(self, number: int) -> None:
        """number: documents with speculation."""
        self._number = number
        self._samples: dict[bool, list[Sample]] = {True: [], False: []}
        self._num_valid = self._num_written = 0

    def run(self, engine: InferenceEngine, speculate: Callable[[bool], None], is_over: Callable[[], bool]) -> None:
        """speculate: switches speculation on or off, and empties the prefix cache, so that none finds another's."""
        for number, first in enumerate(range(0, self._number, AT_ONCE)):
            both = (True, False) if number % 2 else (False, True)
            for chosen in both if number < ROUNDS_WITHOUT + 1 else (True,):
                if is_over():
                    return
                speculate(chosen)
                outputs = write(engine, range(first, min(first + AT_ONCE, self._number)))
                if chosen:
                    self._num_written += len(outputs)
                    self._num_valid += sum(is_valid(output.outputs[0].text) for output in outputs)
                if 0 < number <= ROUNDS_WITHOUT:  # the first round warms up
                    self._samples[chosen].append(sample_of(outputs))

    def lines(self) -> list[str]:
        """What was aimed at, and what came out."""
        if not self._samples[False]:
            return ["not measured  JSON under a schema"]
        speeds = {
            chosen: sum(each.output_tokens for each in samples) / sum(each.seconds for each in samples)
            for chosen, samples in self._samples.items()
        }
        ratio = speeds[True] / speeds[False]
        is_met = ratio >= AIM and self._num_valid == self._num_written == self._number
        return [
            f"{'met' if is_met else 'MISSED':12}  JSON under a schema, {AT_ONCE} at once: {speeds[True]:.1f} instead "
            f"of {speeds[False]:.1f} tokens/s, {ratio:.2f}x, aim: at least {AIM}x; {self._num_valid} of "
            f"{self._number} valid"
        ]


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
