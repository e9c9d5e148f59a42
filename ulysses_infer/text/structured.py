"""Structured outputs: which tokens may come next under a JSON schema, regex, choice or grammar.

The library is llguidance (an Earley parser over regex derivatives, computing masks token by token). Measured on one
CPU core with a byte-level vocabulary of 128,000 tokens, a schema of nine fields and an output of 68 tokens:

                     start-up    compile    mask per token, mean / worst   dependencies
    llguidance 1.9   0.4 s       0.7 ms     0.06 / 0.5 ms                  none
    xgrammar 0.2     0.5 s       98 ms      0.10 / 0.5 ms                  torch, triton, transformers, apache-tvm-ffi
    outlines-core    0.04 s      740 ms     a table look-up                none; regular languages only

Adding the mask to the logits costs another 0.03 ms. Grammars are compiled between two steps, so the compile time
decides. llguidance also limits its work in units ("fuel"), and refuses schema keywords that it cannot express, which
the others ignore.

Left to itself the library writes text that the grammar forces in the tokenizer's canonical tokens. That is switched
off: bad_words or allowed_token_ids may forbid just these tokens while others spell the same text.
"""

from __future__ import annotations

import functools
import json
import re
import threading
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from ulysses_infer.errors import RequestError
from ulysses_infer.model.sampling.token_mask import TokenMask
from ulysses_infer.structured_outputs import StructuredOutputs
from ulysses_infer.text.detokenizer import TokenDecoder
from ulysses_infer.text.first_space import Speller, drops_first_space
from ulysses_infer.text.grammar_state import FirstToken, GrammarState
from ulysses_infer.text.structured_pieces import alternatives_lark, token_ids
from ulysses_infer.text.structured_schema import prepare_schema
from ulysses_infer.text.token_bytes import token_bytes

MAX_COMPILED = 128  # compiled grammars kept
MAX_ERROR = 160  # characters of the library's message that are shown
# The library compiles recursively: some 500 rules in a chain overflow an 8 MiB stack and kill the process.
COMPILE_STACK_BYTES = 2**29
MAX_INDENT = 8
# Between two parts of JSON: one space, or one line break with an indent. With more, weak models write it forever.
WHITESPACE = rf"\x20|\x0A[\x20\x09]{{0,{MAX_INDENT}}}"
# Without \u: an escaped letter would let a key pass for another one. Control characters in a schema need it.
ESCAPES, ALL_ESCAPES = 'nrbtf\\"', 'nrbtf\\"u'
CONTROL_CHARACTER = re.compile(r"(?<!\\)(?:\\\\)*\\u00[01]")
LIMITS = {
    "initial_lexer_fuel": 500_000,
    "step_lexer_fuel": 100_000,
    "step_max_items": 20_000,
    "max_lexer_states": 20_000,
    "max_grammar_size": 200_000,
}
FREE_TOKENS = '%llguidance {"no_forcing": true}\n'
# Grammars inside Lark text would bypass the checks of schemas.
REFUSED_IN_LARK = ("%json", "%regex", "%llguidance", "%lark")

WHITESPACE_PATTERN = re.compile(r"(?:[ \t\n\r\[\](){}|?*+,0-9]|\\[nrts]|\\x(?:20|0[9AaDd]))*")

Result = TypeVar("Result")


def check(wanted: StructuredOutputs) -> None:
    """Refuse what cannot be compiled, without a tokenizer. Raises RequestError of one line."""
    library, grammar = _library(), _as_lark(wanted)
    message = _with_deep_stack(lambda: library.LLMatcher.validate_grammar(grammar, None, limits=_limits(library)))
    if message and not message.startswith("WARNING"):
        raise _refusal(wanted, message)


class GrammarCompiler:
    """Compiles grammars for one tokenizer, and keeps compiled ones. Build one per engine."""

    def __init__(self, tokenizer: Any, vocab_size: int) -> None:
        """vocab_size: the model's, which may be larger than the tokenizer's. Nothing is built before it is needed."""
        self._tokenizer, self._vocab_size = tokenizer, vocab_size
        self._compiled = functools.lru_cache(MAX_COMPILED)(self._compile)

    def prepare(self) -> None:
        """Build what all grammars share: half a second for a large vocabulary. Raises RequestError if that fails."""
        _ = self._vocabulary
        if self.drops_first_space:
            _ = self._first_vocabulary

    def state(
        self, wanted: StructuredOutputs, end_token_ids: Collection[int], begins_a_text: bool = False
    ) -> GrammarState:
        """The initial state of an output that has to match `wanted`. Raises RequestError of one line.

        begins_a_text: the output is decoded as a text of its own, of which some decoders drop the first space.
        """
        matcher, first = self._matcher(wanted), None
        if begins_a_text and self.drops_first_space:
            first = FirstToken(self._matcher(wanted, is_first=True), self._spell_without_space)
        return GrammarState(matcher, self._vocab_size, end_token_ids, self._spell, first)

    def _matcher(self, wanted: StructuredOutputs, is_first: bool = False) -> Any:
        library, grammar = _library(), _as_lark(wanted)
        if wanted.alternatives is not None:
            self._check_tokens(json.loads(str(wanted.alternatives)))
        found = self._compiled(grammar, is_first)
        if isinstance(found, str):
            raise _refusal(wanted, found)
        assert isinstance(found, library.LLMatcher)
        return found.deep_copy()

    def _spell(self, text: bytes) -> Sequence[int]:
        """Tokens with this text, the longest first; none if there are none."""
        return self._speller.spell(text) or ()

    def _spell_without_space(self, token: int) -> Sequence[int]:
        return self._speller.spell(self.token_bytes[token].removeprefix(b" ")) or (token,)

    @functools.cached_property
    def drops_first_space(self) -> bool:
        """Whether the tokenizer's decoder drops the first space of a text."""
        return drops_first_space(TokenDecoder(self._tokenizer), self.token_bytes)

    @functools.cached_property
    def _speller(self) -> Speller:
        return Speller(self.token_bytes)

    @functools.cached_property
    def token_bytes(self) -> list[bytes]:
        """The bytes of each token id. Raises RequestError without a tokenizer, or if it works in an unknown way."""
        if self._tokenizer is None:
            raise RequestError("structured_outputs needs a tokenizer; set model.tokenizer")
        return token_bytes(self._tokenizer, self._vocab_size)

    def _check_tokens(self, alternatives: Any) -> None:
        largest = max(token_ids(alternatives), default=0)
        if largest >= self._vocab_size:
            raise RequestError(
                f"structured_outputs.alternatives has the token {largest}, which the model's vocabulary lacks; "
                f"use ids below {self._vocab_size}"
            )

    @functools.cached_property
    def _vocabulary(self) -> Any:
        return _library().LLTokenizer(_Vocabulary(self.token_bytes))

    @functools.cached_property
    def _first_vocabulary(self) -> Any:
        """The vocabulary of the first token: without its space, and without tokens that cannot be spelled so."""
        pieces = [
            piece.removeprefix(b" ") if self._speller.spell(piece.removeprefix(b" ")) else b""
            for piece in self.token_bytes
        ]
        return _library().LLTokenizer(_Vocabulary(pieces))

    def _compile(self, grammar: str, is_first: bool) -> Any:
        """A matcher in its initial state, or the library's message."""
        library, vocabulary = _library(), self._first_vocabulary if is_first else self._vocabulary

        def build() -> Any:
            matcher = library.LLMatcher(vocabulary, grammar, log_level=0, limits=_limits(library))
            return matcher.get_error() or _dead_end(matcher.deep_copy(), self._vocab_size) or matcher

        return _with_deep_stack(build)


class _Vocabulary:
    """The library's view of a tokenizer. One additional id stands for the end of the output."""

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(self, tokens: list[bytes]) -> None:
        self.tokens = [*tokens, b"<end>"]
        self.eos_token_id = len(tokens)
        self.special_token_ids = [len(tokens)]

    def __call__(self, text: str) -> list[int]:
        """Only called when tokens are forced, which does not happen."""
        return []


def _dead_end(matcher: Any, vocab_size: int) -> str:
    """Why no first token is possible; "" if one is possible or none is needed."""
    mask = TokenMask(matcher.compute_bitmask(), vocab_size)
    if matcher.is_error() and "NoExtension" not in matcher.get_error():
        return str(matcher.get_error())
    return "" if mask.token_ids().size or matcher.is_accepting() else "no text matches it"


# --- requests as grammars ---


def _as_lark(wanted: StructuredOutputs) -> str:
    if wanted.json is not None:
        return FREE_TOKENS + "start: %json " + _schema_text(str(wanted.json), _white_space(wanted))
    if wanted.json_object:
        return FREE_TOKENS + "start: %json " + _with_options({"type": "object"}, _white_space(wanted))
    if wanted.alternatives is not None:
        white_space = _white_space(wanted)
        return FREE_TOKENS + alternatives_lark(
            json.loads(str(wanted.alternatives)), lambda schema: _schema_text(json.dumps(schema), white_space)
        )
    if wanted.choice:
        quoted = [json.dumps(text, ensure_ascii=False) for text in wanted.choice]
        # a single terminal, so that limits on parallel rules do not apply
        return FREE_TOKENS + "start: CHOICE\nCHOICE: " + " | ".join(quoted)
    if wanted.regex is not None:
        return FREE_TOKENS + _regex(wanted.regex)
    assert wanted.grammar is not None
    return FREE_TOKENS + _grammar(wanted.grammar)


def _white_space(wanted: StructuredOutputs) -> str | None:
    """The regex for white space between two parts of JSON; None for compact JSON."""
    if wanted.disable_any_whitespace:
        return None
    return WHITESPACE if wanted.whitespace_pattern is None else _only_white_space(wanted.whitespace_pattern)


def _only_white_space(pattern: str) -> str | None:
    """The request's own regex, for one run of at least one character."""
    if not WHITESPACE_PATTERN.fullmatch(pattern):
        raise RequestError(
            f"structured_outputs.whitespace_pattern {pattern[:40]!r} is not a regex that matches white space alone; "
            "use spaces, tabs and line breaks, such as [ \\n]*"
        )
    return f"(?:{pattern})".replace(r"\s", r"[\x20\x09\x0A\x0D]") if pattern else None


@functools.lru_cache(MAX_COMPILED)
def _schema_text(text: str, white_space: str | None) -> str:
    """The schema for the library."""
    try:
        schema = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RequestError(
            f"structured_outputs.json is not a JSON schema: {str(error)[:MAX_ERROR]}; use a JSON object"
        ) from error
    if schema is True:
        schema = {}
    if not isinstance(schema, dict):
        raise RequestError(
            f"structured_outputs.json is not a JSON schema: {str(schema)[:40]!r} is not an object; use a JSON object"
        )
    try:
        return _with_options(prepare_schema(schema), white_space)
    except RecursionError as error:
        raise RequestError("structured_outputs.json is nested too deeply; use fewer levels") from error


def _with_options(schema: dict[str, Any], white_space: str | None) -> str:
    """The schema's text with options for the library; such options in the request are ignored."""
    needs_escapes = CONTROL_CHARACTER.search(json.dumps(schema))
    options: dict[str, Any] = {
        "whitespace_flexible": False,
        "json_allowed_escapes": ALL_ESCAPES if needs_escapes else ESCAPES,
    }
    if white_space is not None:
        options["whitespace_pattern"] = white_space
    return json.dumps({**schema, "x-guidance": options}, ensure_ascii=False)


def _regex(pattern: str) -> str:
    """Lark for a regex. The whole output has to match, so anchors at its ends are dropped."""
    pattern = pattern.removeprefix("^")
    num_backslashes = len(pattern) - 1 - len(pattern[:-1].rstrip("\\"))
    if pattern.endswith("$") and num_backslashes % 2 == 0:
        pattern = pattern[:-1]
    grammar = json.loads(_library().LLMatcher.grammar_from_regex(pattern))
    return str(grammar["grammars"][0]["lark_grammar"])


def _grammar(text: str) -> str:
    for directive in REFUSED_IN_LARK:
        if directive in text:
            raise RequestError(
                f"structured_outputs.grammar uses {directive}, which is not served; use rules and terminals alone"
            )
    if "::=" not in text:
        return text
    from llguidance.gbnf_to_lark import any_to_lark

    try:
        return str(any_to_lark(text))
    except Exception as error:  # a parser of free text: whatever it raises, the text is wrong
        raise RequestError(f"structured_outputs.grammar is not GBNF: {_one_line(str(error))}; or use Lark") from error


# --- the library ---


def _library() -> Any:
    try:
        import llguidance
    except ImportError as error:
        message = 'structured_outputs needs llguidance; install: pip install "ulysses_infer[serve]"'
        raise RequestError(message) from error
    return llguidance


def _limits(library: Any) -> Any:
    return library.LLParserLimits(**LIMITS, precompute_large_lexemes=False, verbose_errors=False)


def _with_deep_stack(function: Callable[[], Result]) -> Result:
    """The function's result, computed on a thread with room for deep recursion."""
    usual = threading.stack_size(COMPILE_STACK_BYTES)
    try:
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(function).result()
    finally:
        threading.stack_size(usual)


def _refusal(wanted: StructuredOutputs, message: str) -> RequestError:
    kind = next(iter(wanted.to_mapping()))
    return RequestError(f"structured_outputs.{kind} cannot be used: {_one_line(message)}; change it or leave it out")


def _one_line(message: str) -> str:
    """The library's message without the excerpt of its own input and the state that follow it."""
    text = " ".join(re.split(r"\n\s*1 \||\n<state>", message)[0].removeprefix("at 2(8): ").split())
    return text if len(text) <= MAX_ERROR else text[: MAX_ERROR - 3] + "..."
