"""Grammars over single bytes: what they admit, without a tokenizer or a model."""

import functools
import random

import llguidance

from ulysses_infer.structured_outputs import StructuredOutputs
from ulysses_infer.text.structured import LIMITS, _as_lark

NUM_BYTES = 255  # 0xFF is in no text; ids from 255 stand for special tokens


class _Bytes:
    is_tokenizer_wrapper = True
    bos_token_id = None
    eos_token_id = NUM_BYTES + 2

    def __init__(self):
        self.tokens = [*(bytes([byte]) for byte in range(NUM_BYTES)), b"", b"", b"<end>"]
        self.special_token_ids = [self.eos_token_id]

    def __call__(self, text):
        return []


@functools.cache
def _tokenizer():
    return llguidance.LLTokenizer(_Bytes())


def matcher(**wanted):
    """A matcher of `StructuredOutputs(**wanted)`. Raises RequestError, or ValueError with the library's message."""
    limits = llguidance.LLParserLimits(**LIMITS, precompute_large_lexemes=False, verbose_errors=False)
    grammar = _as_lark(StructuredOutputs(**wanted))
    found = llguidance.LLMatcher(_tokenizer(), grammar, log_level=0, limits=limits)
    if found.get_error():
        raise ValueError(found.get_error())
    return found


def matches(text, **wanted):
    """Whether the grammar admits `text`: a string, or a list of strings and token ids from 255."""
    state = matcher(**wanted)
    parts = [text] if isinstance(text, str) else text
    tokens = [token for part in parts for token in ([part] if isinstance(part, int) else part.encode())]
    return all(state.consume_token(token) for token in tokens) and state.is_accepting()


def sample(state, seed, limit=120):
    """Random bytes that the grammar admits, and whether they are complete."""
    state, chosen, output = state.deep_copy(), random.Random(seed), b""
    while len(output) < limit:
        bits = state.compute_bitmask()
        allowed = [byte for byte in range(NUM_BYTES) if bits[byte // 8] >> (byte % 8) & 1]
        if not allowed or (state.is_accepting() and chosen.random() < 0.5):
            break
        likely = [byte for byte in allowed if byte in b'"}]1ae\\u06,:']
        byte = chosen.choice(likely if likely and chosen.random() < 0.7 else allowed)
        output += bytes([byte])
        state.consume_token(byte)
    return output, state.is_accepting()
