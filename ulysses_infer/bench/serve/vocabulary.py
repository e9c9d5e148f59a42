"""The material of random prompts: token ids of the server's tokenizer, or words."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass

from ulysses_infer.bench.serve.client import Client
from ulysses_infer.errors import RequestError

SYLLABLES = [first + second for first in "bdfgklmnprstvz" for second in "aeiou"]
WORDS = [a + b for a, b in itertools.product(SYLLABLES, SYLLABLES)]
SAMPLE_WORDS = 2000
USUAL_TOKENS_PER_WORD = 1.5  # if there is no tokenizer to query

Units = list[int] | list[str]
"""Pieces of a prompt: token ids or words."""


@dataclass(frozen=True)
class PromptVocabulary:
    """Makes random prompts of about a given number of tokens; exact with token ids."""

    ids: Sequence[int] = ()
    """Token ids to draw from; empty: prompts are text."""
    tokens_per_word: float = USUAL_TOKENS_PER_WORD

    def num_units(self, num_tokens: int) -> int:
        """Number of units that make `num_tokens` tokens; at least one."""
        return max(1, num_tokens if self.ids else round(num_tokens / self.tokens_per_word))

    def units(self, draw: random.Random, num_tokens: int) -> Units:
        """Random pieces of a prompt."""
        return self.pieces(draw, self.num_units(num_tokens))

    def pieces(self, draw: random.Random, count: int) -> Units:
        """`count` random pieces."""
        return draw.choices(self.ids, k=count) if self.ids else draw.choices(WORDS, k=count)

    def prompt(self, units: Units) -> str | list[int]:
        """The pieces as a prompt."""
        return list(units) if self.ids else " ".join(map(str, units))  # type: ignore[arg-type]


async def ask_vocabulary(client: Client, model: str, is_text: bool, vocab_size: int | None) -> PromptVocabulary:
    """The vocabulary for this server: text if it has no `/tokenize` and no `vocab_size` is given.

    The ids are those of a sample of words, so none is a special token and all decode to text.
    """
    if vocab_size is not None and not is_text:
        return PromptVocabulary(range(vocab_size))
    sample = random.Random(0).choices(WORDS, k=SAMPLE_WORDS)
    try:
        answer = await client.call("POST", "/tokenize", {"model": model, "prompt": " ".join(sample)})
        tokens = answer["tokens"]
    except (RequestError, KeyError, TypeError):
        return PromptVocabulary()  # another server, or one without a tokenizer: all accept text
    tokens_per_word = len(tokens) / SAMPLE_WORDS
    return PromptVocabulary(() if is_text else tuple(sorted(set(tokens))), tokens_per_word)
