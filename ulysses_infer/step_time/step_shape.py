"""The features of a step that determine its time."""

from __future__ import annotations

from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

BREAKPOINTS = (1, 8, 32, 128, 512, 2048)
"""Token counts at which the coefficient of one more token may change: weights are read once a step, however many tokens
share them, so a token costs little until computing takes longer than reading."""
_SEGMENTS = tuple((low, high - low) for low, high in pairwise(BREAKPOINTS))  # all but the last, which has no end

FEATURES = (
    "constant",
    *(f"tokens_from_{knot}" for knot in BREAKPOINTS),
    "prefill_tokens",
    "decodes",
    "prefills",
    "decode_context",
    "prefill_context",
    "fresh_pairs",
    "past_pairs",
)
"""Names of the numbers in `StepShape.features`."""
NUM_SHARED = 4
"""The last of them, the work of attention, cost much the same in every mode: each rank attends with its own heads."""

Bucket = tuple[int, int, int]
LARGEST_FINE = 512  # tokens of steps without prompts up to which kinds are told apart by halves of a power of two


def sizes_between(least: int, most: int) -> list[int]:
    """Sizes of steps that are worth telling apart, in tokens: all up to 8, then four for each power of two.

    Kernels compute rows in tiles of such sizes, so one row more than a size may cost as much as several.
    """
    sizes, size = [], 1
    while size <= most:
        if size >= least:
            sizes.append(size)
        size += max(1, 1 << max(0, size.bit_length() - 3))
    return sizes


class StepShape(NamedTuple):
    """A step in numbers. Decodes compute one token each, prefills a chunk of their prompt."""

    num_prefill_tokens: int
    num_decodes: int
    num_prefills: int
    """Sequences that compute a chunk."""
    decode_context: int
    """Cached tokens that decodes attend to, summed over them."""
    prefill_context: int
    """Cached tokens before a chunk and in it, summed over chunks."""
    fresh_pairs: int
    """Query-key pairs within chunks: n (n + 1) / 2 for one of n tokens."""
    past_pairs: int
    """Query-key pairs of chunks with the tokens before them: tokens times context."""

    @classmethod
    def of(cls, decode_contexts: list[int], chunks: list[tuple[int, int]]) -> StepShape:
        """Of the decodes' contexts, their own token included, and of each chunk's (start, tokens)."""
        return cls(
            num_prefill_tokens=sum([count for _, count in chunks]),
            num_decodes=len(decode_contexts),
            num_prefills=len(chunks),
            decode_context=sum(decode_contexts),
            prefill_context=sum([start + count for start, count in chunks]),
            fresh_pairs=sum([count * (count + 1) // 2 for _, count in chunks]),
            past_pairs=sum([start * count for start, count in chunks]),
        )

    @property
    def num_tokens(self) -> int:
        """Batched tokens."""
        return self.num_prefill_tokens + self.num_decodes

    @property
    def num_sequences(self) -> int:
        """Sequences that take part."""
        return self.num_decodes + self.num_prefills

    @property
    def bucket(self) -> Bucket:
        """The kind of step this is: tokens and mean context in powers of two and four, prefill or not.

        Steps of one kind are close enough that what was measured of one corrects the prediction of another. Those
        without prompts that are not large are told apart by halves of a power of two, which they may fill: 13 to 16
        rows take much the same time, 17 may take twice as long.
        """
        return _bucket(self)

    @property
    def narrowed(self) -> StepShape:
        """The step of the tokens whose logits are needed alone: one of each sequence, over all of its context."""
        context = self.decode_context + self.prefill_context
        return StepShape(0, self.num_sequences, 0, context, 0, 0, 0)

    def features(self) -> tuple[int, ...]:
        """F numbers, in the order of `FEATURES`; a step's time is modelled as a sum of coefficients times these."""
        tokens = self.num_tokens
        segments = [min(max(tokens - low, 0), length) for low, length in _SEGMENTS]
        segments.append(max(tokens - BREAKPOINTS[-1], 0))
        return (1, *segments, *self)

    def __str__(self) -> str:
        context = self.decode_context + self.prefill_context
        return f"{self.num_decodes} decodes, {self.num_prefill_tokens} prefill tokens, {context} in context"


def _half_power(count: int) -> int:
    """Which half of a power of two ends at `count` or next after it: 1, 2, 3, 4, 6, 8, 12, 16, 24 ... are different."""
    power = (count - 1).bit_length()
    return 2 * power - int(count <= 3 << (power - 2)) if power > 1 else power


@lru_cache(maxsize=16)  # a step's kind and features are needed to predict, to compare and to remember it
def _bucket(shape: StepShape) -> Bucket:
    tokens, context = shape.num_tokens, shape.decode_context + shape.prefill_context
    is_fine = shape.num_prefills == 0 and tokens <= LARGEST_FINE
    size = -_half_power(tokens) if is_fine else tokens.bit_length()
    return size, (context // max(1, shape.num_sequences)).bit_length() // 2, int(shape.num_prefills > 0)
