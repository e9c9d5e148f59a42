"""`SamplingParams`: how a request is sampled, with vLLM's names and defaults; every value is checked.

An invalid value is a `RequestError` of one line: field, value, remedy. Light: no torch, no tokenizer library.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from ulysses_infer.errors import RequestError, kind_and_line
from ulysses_infer.request_values import (
    MAX_COUNT,
    distinct_strings,
    distinct_token_ids,
    integer,
    optional_integer,
    real_number,
    shown,
    unknown_key,
)
from ulysses_infer.structured_outputs import StructuredOutputs

GREEDY_TEMPERATURE = 1e-5  # temperatures below this are greedy, as in vLLM
MAX_SEQUENCES = 16384
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


class TextEncoder(Protocol):
    """The part of a Hugging Face tokenizer that turning bad words into token ids needs."""

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Token ids of `text`."""


POOLINGS = ("last", "mean", "cls")
"""How the hidden states of a prompt become one vector: that of the last token, their mean, or that of the first."""


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
            raise RequestError(f"sampling parameters must be a mapping, got {shown(mapping)}; use {{temperature: 0}}")
        defaults = {known.name: known.default for known in dataclasses.fields(cls)}
        for key in mapping:
            if key not in defaults:
                raise RequestError(unknown_key(key, defaults))
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
                raise RequestError(f"bad_words entry {shown(word)} has no tokens; leave it out")
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
        self.n = integer("n", self.n, 1, MAX_SEQUENCES)
        self.presence_penalty = real_number("presence_penalty", self.presence_penalty, *PENALTY_RANGE)
        self.frequency_penalty = real_number("frequency_penalty", self.frequency_penalty, *PENALTY_RANGE)
        self.repetition_penalty = real_number(
            "repetition_penalty", self.repetition_penalty, *REPETITION_PENALTY_RANGE, open_low=True
        )
        self.temperature = real_number("temperature", self.temperature, *TEMPERATURE_RANGE)
        self.top_p = real_number("top_p", self.top_p, *TOP_P_RANGE, open_low=True)
        self.top_k = max(integer("top_k", self.top_k, *TOP_K_RANGE), 0)
        self.min_p = real_number("min_p", self.min_p, *MIN_P_RANGE)
        self.min_tokens = integer("min_tokens", self.min_tokens, 0, MAX_COUNT)
        self.max_tokens = optional_integer("max_tokens", self.max_tokens, 1, MAX_COUNT)
        self.logprobs = optional_integer("logprobs", self.logprobs, -1, MAX_COUNT)
        self.prompt_logprobs = optional_integer("prompt_logprobs", self.prompt_logprobs, -1, MAX_COUNT)
        self.seed = optional_integer("seed", self.seed, *SEED_RANGE)
        if self.seed == SEED_UNSET:
            self.seed = None

    def _check_flags(self) -> None:
        for known in dataclasses.fields(self):
            value = getattr(self, known.name)
            if isinstance(known.default, bool) and not isinstance(value, bool):
                raise RequestError(f"{known.name} must be true or false, got {shown(value)}")

    def _check_token_ids(self) -> None:
        self.stop_token_ids = distinct_token_ids("stop_token_ids", self.stop_token_ids)
        if self.allowed_token_ids is not None:
            self.allowed_token_ids = distinct_token_ids("allowed_token_ids", self.allowed_token_ids)
            if not self.allowed_token_ids:
                raise RequestError("allowed_token_ids is empty, so no token could follow; leave it out to allow all")
        if self.logprob_token_ids is not None:
            self.logprob_token_ids = distinct_token_ids("logprob_token_ids", self.logprob_token_ids)
            self.logprobs = self.logprobs or 0
        if self.logit_bias is not None:
            self.logit_bias = _logit_bias(self.logit_bias)

    def _check_strings(self) -> None:
        self.stop = distinct_strings("stop", [self.stop] if isinstance(self.stop, str) else self.stop)
        self.bad_words = distinct_strings("bad_words", self.bad_words)

    def _check_structure(self) -> None:
        wanted = self.structured_outputs
        if isinstance(wanted, Mapping):
            self.structured_outputs = StructuredOutputs.from_mapping(wanted)
        elif wanted is not None and not isinstance(wanted, StructuredOutputs):
            raise RequestError(f'structured_outputs must be a mapping, got {shown(wanted)}; use {{"json": schema}}')

    def _check_combinations(self) -> None:
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise RequestError(
                f"min_tokens is {self.min_tokens}, more than max_tokens={self.max_tokens}; raise max_tokens"
            )
        if self.stop and not self.detokenize:
            raise RequestError(f"stop={shown(self.stop)} needs the text; set detokenize=True or use stop_token_ids")
        if self.pooling is not None and self.pooling not in POOLINGS:
            raise RequestError(f"pooling is {shown(self.pooling)}; use {', '.join(POOLINGS)}")
        if self.pooling is not None and self.n > 1:
            raise RequestError(f"n is {self.n} with pooling={self.pooling!r}; a prompt has one vector: use n=1")
        if self.best_of is not None and self.best_of != self.n:
            raise RequestError(
                f"best_of is {shown(self.best_of)}, but outputs are not ranked; use n and choose yourself"
            )


def _logit_bias(value: Any) -> dict[int, float]:
    if not isinstance(value, Mapping):
        raise RequestError(f"logit_bias must map token ids to numbers, got {shown(value)}; use {{17: -5.0}}")
    return {_bias_key(key): real_number(f"logit_bias[{key}]", bias, *LOGIT_BIAS_RANGE) for key, bias in value.items()}


def _bias_key(key: Any) -> int:
    token_id = int(key) if isinstance(key, str) and key.isascii() and key.isdigit() and len(key) < 11 else key
    return distinct_token_ids("logit_bias", [token_id])[0]


def _encode_word(tokenizer: TextEncoder, word: str, text: str) -> list[int]:
    try:
        return list(tokenizer.encode(text, add_special_tokens=False))
    except Exception as error:  # tokenizer libraries raise anything, for half a surrogate pair for example
        raise RequestError(
            f"bad_words entry {shown(word)} is refused by the tokenizer ({kind_and_line(error)}); leave it out"
        ) from error
