"""Special tokens in text that is read for tool calls or reasoning.

Tags may be special tokens, which text does not show. Their text is then decoded with special tokens. The parsers read
it without the other ones, and what they return is shown without any.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import regex


@dataclass(frozen=True)
class SpecialTags:
    """Special tokens of a tokenizer, for the formats of one output."""

    tags: Mapping[str, list[int]]
    """The text of those that are part of the markup, with their ids."""
    others: Collection[str]
    """The text of all others."""

    def before_parser(self) -> TextRemover:
        """Removes other special tokens, for one output."""
        return TextRemover(self._others)

    def in_content(self) -> TextRemover:
        """Removes tags that the parsers left, for one output."""
        return TextRemover(self._tags)

    @functools.cached_property
    def _others(self) -> RemovedTexts:
        return RemovedTexts(self.others)

    @functools.cached_property
    def _tags(self) -> RemovedTexts:
        return RemovedTexts(self.tags)


def special_tags(markup: Collection[str], special_texts: Mapping[str, list[int]]) -> SpecialTags | None:
    """The special tokens of a tokenizer, if the tags in `markup` have any; `special_texts`: their texts and ids."""
    tags = {text: ids for text, ids in special_texts.items() if text and _is_in(text, markup)}
    return SpecialTags(tags, [text for text in special_texts if text and text not in tags]) if tags else None


def _is_in(text: str, tags: Collection[str]) -> bool:
    return any(text in tag or tag in text for tag in tags)


class RemovedTexts:
    """Texts to remove, prepared for many outputs."""

    def __init__(self, texts: Collection[str]) -> None:
        longest_first = sorted(texts, key=len, reverse=True)
        self.pattern = regex.compile("|".join(map(regex.escape, longest_first))) if texts else None
        self.starts = frozenset(text[:length] for text in texts for length in range(1, len(text)))
        self.longest_start = max(map(len, self.starts), default=0)


class TextRemover:
    """Removes texts from one stream, however it is cut."""

    def __init__(self, removed: RemovedTexts) -> None:
        self._removed = removed
        self._held = ""

    def feed(self, text: str, is_last: bool) -> str:
        """The next piece without the texts. Its end is held back while it may be the start of one."""
        if self._removed.pattern is None:
            return text
        kept, start = "", 0
        text = self._held + text
        for found in self._removed.pattern.finditer(text):
            kept, start = kept + text[start : found.start()], found.end()
        num_held = 0 if is_last else self._num_held(text[start:])
        self._held = text[len(text) - num_held :]
        return kept + text[start : len(text) - num_held]

    def _num_held(self, text: str) -> int:
        longest = min(len(text), self._removed.longest_start)
        return next((n for n in range(longest, 0, -1) if text[-n:] in self._removed.starts), 0)
