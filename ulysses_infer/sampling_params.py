"""`SamplingParams`: how a request is sampled, with vLLM's names and defaults; every value is checked.

An invalid value is a `RequestError` of one line: field, value, remedy. Light: no torch, no tokenizer library.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import numbers
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from ulysses_infer.errors import RequestError, kind_and_line

GREEDY_TEMPERATURE = 1e-5  # temperatures below this are greedy, as in vLLM
MAX_SEQUENCES = 16384
MAX_COUNT = 2**31 - 1  # no sequence is this long: a larger token count is a slip
MAX_SEED = 2**63 - 1
# Ranges of values, both ends included except where noted; requests over HTTP are checked against the same ones.
TEMPERATURE_RANGE = (0, 2)
TOP_P_RANGE = (0, 1)  # 0 excluded
TOP_K_RANGE = (-1, MAX_COUNT)
MIN_P_RANGE = (0, 1)
SEED_RANGE = (-MAX_SEED - 1, MAX_SEED)
PENALTY_RANGE = (-2, 2)  # presence and frequency
REPETITION_PENALTY_RANGE = (0, 1000)  # 0 excluded
LOGIT_BIAS_RANGE = (-100, 100)
SEED_UNSET = -1  # vLLM and its clients write "no seed" as -1
MAX_WHITESPACE_PATTERN = 64
MAX_GRAMMAR_CHARACTERS = 2**17  # of a schema, regex or grammar: larger ones take seconds to compile


class TextEncoder(Protocol):
    """The part of a Hugging Face tokenizer that turning bad words into token ids needs."""

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Token ids of `text`."""


@dataclass(kw_only=True, frozen=True)
class StructuredOutputs:
    """What an output's text must match: exactly one of the fields from `json` to `json_object` (vLLM's names).

    Any wrong value raises `RequestError` at construction. Whether a schema, regex or grammar compiles is known
    later, where the library for it is: `text/structured.py`.
    """

    json: str | dict[str, Any] | None = None  # a JSON schema; becomes its text
    regex: str | None = None  # the whole output matches it
    choice: list[str] | None = None  # the output is one of these
    grammar: str | None = None  # context-free, as Lark writes it, or GBNF
    json_object: bool = False  # any JSON object
    alternatives: str | list[Any] | None = None  # sequences of text, tokens and JSON: text/structured_pieces.py
    disable_any_whitespace: bool = False  # JSON without a space or line break outside its strings
    whitespace_pattern: str | None = None  # regex of the white space between two parts of JSON; None: bounded

    def __post_init__(self) -> None:
        """Normalise and check every field. Raises RequestError."""
        for name in ("json_object", "disable_any_whitespace"):
            if not isinstance(getattr(self, name), bool):
                raise RequestError(f"structured_outputs.{name} must be true or false, got {_show(getattr(self, name))}")
        object.__setattr__(self, "json", _schema_text(self.json))
        object.__setattr__(self, "alternatives", _json_text(self.alternatives))
        self._check_whitespace()
        if self.choice is not None:
            object.__setattr__(self, "choice", _strings("structured_outputs.choice", self.choice))
        given = [name for name in STRUCTURED_KINDS if getattr(self, name) not in (None, False, [])]
        if len(given) != 1:
            raise RequestError(
                f"structured_outputs has {' and '.join(given) or 'nothing to match'}; "
                f"use exactly one of {', '.join(STRUCTURED_KINDS)}"
            )
        self._check_text(given[0])

    def _check_whitespace(self) -> None:
        pattern = self.whitespace_pattern
        if pattern is None:
            return
        if not isinstance(pattern, str) or len(pattern) > MAX_WHITESPACE_PATTERN:
            raise RequestError(f"structured_outputs.whitespace_pattern must be a short regex, got {_show(pattern)}")
        if self.disable_any_whitespace:
            raise RequestError("structured_outputs has disable_any_whitespace and whitespace_pattern; use one of them")

    def _check_text(self, kind: str) -> None:
        value = "\n".join(self.choice or ()) if kind == "choice" else getattr(self, kind)
        if kind == "json_object":
            return
        if not isinstance(value, str) or not value:
            raise RequestError(f"structured_outputs.{kind} must be text, got {_show(value)}; use a string")
        if len(value) > MAX_GRAMMAR_CHARACTERS:
            raise RequestError(
                f"structured_outputs.{kind} has {len(value)} characters; use at most {MAX_GRAMMAR_CHARACTERS}"
            )
        if value.encode(errors="ignore").decode() != value:
            raise RequestError(f"structured_outputs.{kind} has half a surrogate pair, which no text has; remove it")

    @classmethod
    def from_mapping(cls, mapping: Mapping[str, Any]) -> StructuredOutputs:
        """Build from a JSON mapping; None means not given. Raises RequestError for an unknown key."""
        known = [field.name for field in dataclasses.fields(cls)]
        for key in mapping:
            if key not in known:
                raise RequestError(f"structured_outputs: {_unknown_key(key, known, 'key')}")
        return cls(**{key: value for key, value in mapping.items() if value is not None})

    def to_mapping(self) -> dict[str, Any]:
        """What `from_mapping` makes an equal object of: plain values, only what is not the default."""
        return {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if getattr(self, field.name) != field.default
        }


POOLINGS = ("last", "mean", "cls")
"""How the hidden states of a prompt become one vector: that of the last token, their mean, or that of the first."""
STRUCTURED_KINDS = ("json", "regex", "choice", "grammar", "json_object", "alternatives")


@dataclass(kw_only=True)
class SamplingParams:
    """Sampling parameters of one request. Any wrong value raises `RequestError` at construction.

    Fields are normalised: `stop`, `stop_token_ids` and `bad_words` become lists without duplicates, the keys
    of `logit_bias` integers (JSON has only string keys), numbers plain Python ones. The object stays mutable,
    as in vLLM; the engine works on a `clone`, which checks the values again.
    """

    n: int = 1  # outputs per prompt
    best_of: int | None = None  # only the value of n: outputs are not ranked
    presence_penalty: float = 0.0  # [-2, 2], subtracted once for every token id already in the output
    frequency_penalty: float = 0.0  # [-2, 2], subtracted once per occurrence in the output
    repetition_penalty: float = 1.0  # > 0; divides positive, multiplies negative logits of ids seen so far
    temperature: float = 1.0  # [0, 2]; 0 is greedy
    top_p: float = 1.0  # (0, 1]
    top_k: int = 0  # 0 or -1: every token
    min_p: float = 0.0  # [0, 1], relative to the likeliest token
    seed: int | None = None  # None or -1: the engine draws one
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool = False
    max_tokens: int | None = 16  # None: as many as fit in the model's length
    min_tokens: int = 0  # tokens before which neither eos, a stop token nor a stop string ends the output
    logprobs: int | None = None  # top tokens per output position; -1: the whole vocabulary
    logprob_token_ids: list[int] | None = None  # tokens whose log-probabilities are added to those of `logprobs`
    prompt_logprobs: int | None = None  # the same for the prompt's positions
    detokenize: bool = True
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    structured_outputs: StructuredOutputs | Mapping[str, Any] | None = None  # what the text must match
    logit_bias: dict[int, float] | None = None  # token id -> [-100, 100], added to its logit
    allowed_token_ids: list[int] | None = None
    bad_words: list[str] | None = None
    pooling: str | None = None  # last, mean or cls: the prompt's vector, in `RequestOutput.pooled`
    speculation: bool = True  # False: no tokens of this request are drafted

    def __post_init__(self) -> None:
        """Normalise and check every field. Raises RequestError."""
        self._check_numbers()
        self._check_flags()
        self._check_token_ids()
        self._check_strings()
        self._check_structure()
        self._check_combinations()

    @classmethod
    def from_mapping(cls, mapping: Mapping[str, Any]) -> SamplingParams:
        """Build from a recipe or JSON mapping. None means the default, except where None is a value of its
        own (`max_tokens`). Raises RequestError for an unknown key, naming the nearest known one.
        """
        if not isinstance(mapping, Mapping):
            raise RequestError(f"sampling parameters must be a mapping, got {_show(mapping)}; use {{temperature: 0}}")
        defaults = {known.name: known.default for known in dataclasses.fields(cls)}
        for key in mapping:
            if key not in defaults:
                raise RequestError(_unknown_key(key, defaults))
        nullable = {name for name, default in defaults.items() if default is None} | {"max_tokens"}
        return cls(**{key: value for key, value in mapping.items() if value is not None or key in nullable})

    def to_mapping(self) -> dict[str, Any]:
        """What `from_mapping` makes an equal object of: plain JSON or MessagePack values, only what is not default."""
        usual = SamplingParams()
        names = [known.name for known in dataclasses.fields(self)]
        mapping = {name: getattr(self, name) for name in names if getattr(self, name) != getattr(usual, name)}
        if isinstance(self.structured_outputs, StructuredOutputs):
            mapping["structured_outputs"] = self.structured_outputs.to_mapping()
        return mapping

    def clone(self, **changes: Any) -> SamplingParams:
        """A copy that shares no list with this one, every value checked again. Raises RequestError."""
        return dataclasses.replace(self, **changes)

    def validate_for(self, vocab_size: int) -> None:
        """Second step, once the model is known: token ids and log-probability counts must fit `vocab_size`.
        Raises RequestError.
        """
        for name in ("stop_token_ids", "allowed_token_ids", "logprob_token_ids", "logit_bias"):
            largest = max(getattr(self, name) or (0,))
            if largest >= vocab_size:
                raise RequestError(f"{name} has token id {largest}, outside the vocabulary; use 0 to {vocab_size - 1}")
        for name in ("logprobs", "prompt_logprobs"):
            count = getattr(self, name)
            if count is not None and count > vocab_size:
                raise RequestError(
                    f"{name} is {count}, more than the {vocab_size} tokens of the vocabulary; use -1 for all"
                )

    def encode_bad_words(self, tokenizer: TextEncoder) -> list[list[int]]:
        """Token id sequences that spell `bad_words`: each word as it is written at the start of a text and, if that
        gives another sequence of the same length, after a space (vLLM's rule). Raises RequestError.
        """
        sequences: list[list[int]] = []
        for word in self.bad_words or ():
            bare = _encode_word(tokenizer, word, word.lstrip() or word)
            if not bare:
                raise RequestError(f"bad_words entry {_show(word)} has no tokens; leave it out")
            sequences.append(bare)
            spaced = _encode_word(tokenizer, word, " " + word.lstrip())
            if len(spaced) == len(bare) and spaced[0] != bare[0]:
                sequences.append(spaced)
        return sequences

    @property
    def is_greedy(self) -> bool:
        """Whether the likeliest token is taken instead of a random one."""
        return self.temperature < GREEDY_TEMPERATURE

    @property
    def num_distinct(self) -> int:
        """Outputs to compute: with greedy sampling the `n` outputs are equal, and one is computed."""
        return 1 if self.is_greedy else self.n

    def as_computed(self) -> SamplingParams:
        """These parameters with `n` as `num_distinct`."""
        return self if self.n == self.num_distinct else self.clone(n=self.num_distinct, best_of=None)

    @property
    def stop_strings(self) -> list[str]:
        """`stop` as the list it became at construction."""
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    def _check_numbers(self) -> None:
        self.n = _integer("n", self.n, 1, MAX_SEQUENCES)
        self.presence_penalty = _real("presence_penalty", self.presence_penalty, *PENALTY_RANGE)
        self.frequency_penalty = _real("frequency_penalty", self.frequency_penalty, *PENALTY_RANGE)
        self.repetition_penalty = _real(
            "repetition_penalty", self.repetition_penalty, *REPETITION_PENALTY_RANGE, open_low=True
        )
        self.temperature = _real("temperature", self.temperature, *TEMPERATURE_RANGE)
        self.top_p = _real("top_p", self.top_p, *TOP_P_RANGE, open_low=True)
        self.top_k = max(_integer("top_k", self.top_k, *TOP_K_RANGE), 0)
        self.min_p = _real("min_p", self.min_p, *MIN_P_RANGE)
        self.min_tokens = _integer("min_tokens", self.min_tokens, 0, MAX_COUNT)
        self.max_tokens = _optional_integer("max_tokens", self.max_tokens, 1, MAX_COUNT)
        self.logprobs = _optional_integer("logprobs", self.logprobs, -1, MAX_COUNT)
        self.prompt_logprobs = _optional_integer("prompt_logprobs", self.prompt_logprobs, -1, MAX_COUNT)
        self.seed = _optional_integer("seed", self.seed, *SEED_RANGE)
        if self.seed == SEED_UNSET:
            self.seed = None

    def _check_flags(self) -> None:
        for known in dataclasses.fields(self):
            value = getattr(self, known.name)
            if isinstance(known.default, bool) and not isinstance(value, bool):
                raise RequestError(f"{known.name} must be true or false, got {_show(value)}")

    def _check_token_ids(self) -> None:
        self.stop_token_ids = _token_ids("stop_token_ids", self.stop_token_ids)
        if self.allowed_token_ids is not None:
            self.allowed_token_ids = _token_ids("allowed_token_ids", self.allowed_token_ids)
            if not self.allowed_token_ids:
                raise RequestError("allowed_token_ids is empty, so no token could follow; leave it out to allow all")
        if self.logprob_token_ids is not None:
            self.logprob_token_ids = _token_ids("logprob_token_ids", self.logprob_token_ids)
            self.logprobs = self.logprobs or 0
        if self.logit_bias is not None:
            self.logit_bias = _logit_bias(self.logit_bias)

    def _check_strings(self) -> None:
        self.stop = _strings("stop", [self.stop] if isinstance(self.stop, str) else self.stop)
        self.bad_words = _strings("bad_words", self.bad_words)

    def _check_structure(self) -> None:
        wanted = self.structured_outputs
        if isinstance(wanted, Mapping):
            self.structured_outputs = StructuredOutputs.from_mapping(wanted)
        elif wanted is not None and not isinstance(wanted, StructuredOutputs):
            raise RequestError(f'structured_outputs must be a mapping, got {_show(wanted)}; use {{"json": schema}}')

    def _check_combinations(self) -> None:
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise RequestError(
                f"min_tokens is {self.min_tokens}, more than max_tokens={self.max_tokens}; raise max_tokens"
            )
        if self.stop and not self.detokenize:
            raise RequestError(f"stop={_show(self.stop)} needs the text; set detokenize=True or use stop_token_ids")
        if self.pooling is not None and self.pooling not in POOLINGS:
            raise RequestError(f"pooling is {_show(self.pooling)}; use {', '.join(POOLINGS)}")
        if self.pooling is not None and self.n > 1:
            raise RequestError(f"n is {self.n} with pooling={self.pooling!r}; a prompt has one vector: use n=1")
        if self.best_of is not None and self.best_of != self.n:
            raise RequestError(
                f"best_of is {_show(self.best_of)}, but outputs are not ranked; use n and choose yourself"
            )


def _show(value: object) -> str:
    """`repr(value)` short enough for one line; Python refuses to print an integer of thousands of digits."""
    if isinstance(value, int) and value.bit_length() > 200:
        return f"an integer of {value.bit_length()} bits"
    text = repr(value).replace("\n", " ")
    return text if len(text) <= 60 else text[:57] + "..."


def _schema_text(schema: Any) -> Any:
    """A schema given as a mapping, in JSON; anything else as it is."""
    if not isinstance(schema, Mapping):
        return schema
    try:
        return json.dumps(dict(schema), allow_nan=False, ensure_ascii=False, separators=(",", ":"))
    except (TypeError, ValueError, RecursionError) as error:
        raise RequestError(
            f"structured_outputs.json is not a JSON schema ({str(error)[:80]}); use plain JSON values"
        ) from error


def _json_text(value: Any) -> Any:
    """A list in JSON; anything else as it is."""
    return _schema_text({"": value})[4:-1] if isinstance(value, list) else value


def _unknown_key(key: object, known: Iterable[str], what: str = "sampling parameter") -> str:
    nearest = difflib.get_close_matches(str(key), list(known), n=1)
    hint = f"did you mean '{nearest[0]}'?" if nearest else f"known: {', '.join(known)}"
    return f"unknown {what} {_show(key)}; {hint}"


def _is_integer(value: object) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def _integer(name: str, value: Any, low: int, high: int) -> int:
    if not _is_integer(value):
        raise RequestError(f"{name} must be an integer, got {_show(value)}; use {low} to {high}")
    if not low <= value <= high:
        raise RequestError(f"{name} must be from {low} to {high}, got {_show(int(value))}")
    return int(value)


def _optional_integer(name: str, value: Any, low: int, high: int) -> int | None:
    return None if value is None else _integer(name, value, low, high)


def _real(name: str, value: Any, low: float, high: float, open_low: bool = False) -> float:
    remedy = f"use a number {'above' if open_low else 'from'} {low:g} {'up ' if open_low else ''}to {high:g}"
    is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not is_number:
        raise RequestError(f"{name} must be a number, got {_show(value)}; {remedy}")
    if not low <= value <= high or (open_low and value == low):  # NaN compares false
        raise RequestError(f"{name} is out of range, got {_show(value)}; {remedy}")
    return float(value)


def _list(name: str, value: Any, remedy: str) -> list[Any]:
    if value is None:
        return []
    if isinstance(value, (str, bytes, Mapping)) or not isinstance(value, Iterable):
        raise RequestError(f"{name} must be a list, got {_show(value)}; {remedy}")
    return list(value)


def _token_ids(name: str, value: Any) -> list[int]:
    token_ids = _list(name, value, "use token ids, as in [1, 2]")
    for token_id in token_ids:
        if not _is_integer(token_id) or not 0 <= token_id <= MAX_COUNT:
            raise RequestError(f"{name} has {_show(token_id)}, which is not a token id; use integers from 0 up")
    return list(dict.fromkeys(int(token_id) for token_id in token_ids))


def _strings(name: str, value: Any) -> list[str]:
    strings = _list(name, value, 'use strings, as in ["a", "b"]')
    for string in strings:
        if not isinstance(string, str) or not string:
            raise RequestError(f"{name} has {_show(string)}; use strings that are not empty")
    return list(dict.fromkeys(strings))


def _logit_bias(value: Any) -> dict[int, float]:
    if not isinstance(value, Mapping):
        raise RequestError(f"logit_bias must map token ids to numbers, got {_show(value)}; use {{17: -5.0}}")
    return {_bias_key(key): _real(f"logit_bias[{key}]", bias, *LOGIT_BIAS_RANGE) for key, bias in value.items()}


def _bias_key(key: Any) -> int:
    token_id = int(key) if isinstance(key, str) and key.isascii() and key.isdigit() and len(key) < 11 else key
    return _token_ids("logit_bias", [token_id])[0]


def _encode_word(tokenizer: TextEncoder, word: str, text: str) -> list[int]:
    try:
        return list(tokenizer.encode(text, add_special_tokens=False))
    except Exception as error:  # tokenizer libraries raise anything, for half a surrogate pair for example
        raise RequestError(
            f"bad_words entry {_show(word)} is refused by the tokenizer ({kind_and_line(error)}); leave it out"
        ) from error
