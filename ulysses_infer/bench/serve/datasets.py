"""Prompts of a benchmark: random, with shared prefixes, from files, from traces."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from ulysses_infer.bench.serve.client import Client
from ulysses_infer.bench.serve.item import Item
from ulysses_infer.bench.serve.traces import HASH_BLOCK_TOKENS, TraceRow
from ulysses_infer.bench.serve.vocabulary import PromptVocabulary, Units
from ulysses_infer.errors import ConfigError

LONGEST_PROMPT, LONGEST_CONVERSATION, SHORTEST_TURN = 1024, 2048, 4  # tokens; vLLM's filter of ShareGPT


def random_items(
    vocabulary: PromptVocabulary, input_len: int, output_len: int, range_ratio: float, seed: int
) -> Iterator[Item]:
    """An endless series of random prompts; lengths are uniform within ± `range_ratio`."""
    draw = random.Random(f"random/{seed}")
    while True:
        units = vocabulary.units(draw, _around(input_len, range_ratio, draw))
        yield Item(vocabulary.prompt(units), _around(output_len, range_ratio, draw))


def _around(length: int, range_ratio: float, draw: random.Random) -> int:
    return max(1, draw.randint(round(length * (1 - range_ratio)), round(length * (1 + range_ratio))))


def prefix_items(
    vocabulary: PromptVocabulary, prefix_len: int, suffix_len: int, num_prefixes: int, output_len: int, seed: int
) -> Iterator[Item]:
    """An endless series of prompts that start with one of a few prefixes, each equally often."""
    draw = random.Random(f"prefixes/{seed}")
    prefixes = [vocabulary.units(draw, prefix_len) for _ in range(num_prefixes)]
    while True:
        for prefix in draw.sample(prefixes, num_prefixes):
            yield Item(vocabulary.prompt(_joined(prefix, vocabulary.units(draw, suffix_len))), output_len)


def trace_items(
    rows: Sequence[TraceRow], vocabulary: PromptVocabulary, seed: int, block_tokens: float = HASH_BLOCK_TOKENS
) -> list[Item]:
    """The requests of a trace at their times; blocks with equal hash ids have equal tokens.

    `block_tokens`: tokens per hash id; not necessarily an integer if the lengths of the trace were scaled.
    """
    return [
        Item(
            vocabulary.prompt(_trace_units(row, number, vocabulary, seed, block_tokens)),
            max(1, row.output_len),
            row.at,
        )
        for number, row in enumerate(rows)
    ]


def _trace_units(row: TraceRow, number: int, vocabulary: PromptVocabulary, seed: int, block_tokens: float) -> Units:
    """Block starts are rounded from their exact positions, so that rounding errors do not accumulate."""
    total = vocabulary.num_units(row.input_len)
    starts = [0, *(vocabulary.num_units(round(block_tokens * (i + 1))) for i in range(len(row.hash_ids)))]
    units: Units = []
    for hash_id, (start, end) in zip(row.hash_ids, pairwise(starts), strict=True):
        units = _joined(units, _units(vocabulary, f"block/{seed}/{hash_id}", end - start))
    return _joined(units, _units(vocabulary, f"trace/{seed}/{number}", total - len(units)))[:total]


def _units(vocabulary: PromptVocabulary, name: str, count: int) -> Units:
    """`count` units determined by the name alone; a smaller count gives a prefix of a larger one."""
    return vocabulary.pieces(random.Random(name), max(0, count))


def _joined(first: Units, second: Units) -> Units:
    return [*first, *second]


def custom_items(path: Path, output_len: int | None) -> list[Item]:
    """JSON lines with `prompt` (text or token ids) or `messages`, and `max_tokens` unless `output_len` is given.

    Raises `ConfigError` with the number of the invalid line.
    """
    items = []
    for number, line in enumerate(_read(path).splitlines(), 1):
        if line.strip():
            try:
                items.append(_custom_item(json.loads(line), output_len))
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise ConfigError(f"dataset '{path}', line {number}: {error}") from error
    return items


def _custom_item(row: Mapping[str, Any], output_len: int | None) -> Item:
    length = output_len or row.get("max_tokens") or row.get("output_tokens")
    content = row.get("messages") or row.get("prompt")
    if not isinstance(content, (str, list)) or not content:
        raise ValueError("there is no prompt or messages")
    if not isinstance(length, int) or length < 1:
        raise ValueError("there is no max_tokens of at least 1; add it, or give --output-len")
    return Item(content, length)


async def sharegpt_items(
    path: Path, count: int, output_len: int | None, client: Client, model: str, seed: int
) -> list[Item]:
    """The first question of each conversation, in random order, with the output length of its recorded answer.

    The server's tokenizer measures lengths. Very short or long conversations are left out, as in vLLM.
    Raises `ConfigError` for a file of another format, `RequestError` if the server has no `/tokenize`.
    """
    turns = [_first_turns(row) for row in _conversations(path)]
    pairs = [pair for pair in turns if pair is not None]
    random.Random(f"sharegpt/{seed}").shuffle(pairs)
    items: list[Item] = []
    for question, answer in pairs:
        if len(items) == count:
            break
        prompt_tokens = await _num_tokens(client, model, question)
        answer_tokens = output_len or await _num_tokens(client, model, answer)
        if _has_usual_length(prompt_tokens, answer_tokens, output_len):
            items.append(Item(question, answer_tokens))
    return items


def _has_usual_length(prompt_tokens: int, answer_tokens: int, output_len: int | None) -> bool:
    is_long_enough = prompt_tokens >= SHORTEST_TURN and (output_len is not None or answer_tokens >= SHORTEST_TURN)
    is_short_enough = prompt_tokens <= LONGEST_PROMPT and prompt_tokens + answer_tokens <= LONGEST_CONVERSATION
    return is_long_enough and is_short_enough


def _conversations(path: Path) -> list[Any]:
    try:
        rows = json.loads(_read(path))
    except ValueError as error:
        raise ConfigError(f"dataset '{path}' is not JSON: {error}") from error
    if not isinstance(rows, list):
        raise ConfigError(f"dataset '{path}' is not a list of conversations, as ShareGPT's files are")
    return rows


def _first_turns(row: Any) -> tuple[str, str] | None:
    turns = row.get("conversations", row.get("conversation")) if isinstance(row, dict) else None
    if not isinstance(turns, list) or len(turns) < 2:
        return None
    question, answer = (turn.get("value") for turn in turns[:2])
    return (question, answer) if question and answer else None


async def _num_tokens(client: Client, model: str, text: str) -> int:
    answer = await client.call("POST", "/tokenize", {"model": model, "prompt": text})
    return int(answer["count"])


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"dataset '{path}' cannot be read: {error.strerror}") from error


def take(items: Iterator[Item] | Sequence[Item], count: int | None) -> list[Item]:
    """The first `count` items, or all if it is None. Raises `ConfigError` if there are fewer."""
    taken = list(itertools.islice(items, count))
    if count is not None and len(taken) < count:
        raise ConfigError(f"the dataset has only {len(taken)} requests; lower --num-prompts {count}")
    return taken
