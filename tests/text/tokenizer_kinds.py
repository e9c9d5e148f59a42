"""Tokenizers of every kind that decodes in its own way."""

import functools

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizer, PreTrainedTokenizerFast

CORPUS = [
    "the quick brown fox",
    "def main(): return 1",
    "naïve café 你好世界",
    "👩‍👩‍👧 family 👍🏽 e\u0301",
] * 3
SPECIALS = ["<unk>", "<s>", "</s>"]


def wrapped(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def byte_level() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=330, initial_alphabet=alphabet, special_tokens=SPECIALS)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return wrapped(tokenizer)


def sentencepiece() -> PreTrainedTokenizerFast:
    """As Llama-2's: spaces are ▁, characters not in the vocabulary are bytes, the first space is stripped."""
    words = ["▁", "▁the", "▁quick", "e", "a", "t", "é", "你", "▁▁", ".", "\n"]
    pieces = [*SPECIALS, *(f"<0x{byte:02X}>" for byte in range(256)), *words]
    vocab = {piece: index for index, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    return wrapped(tokenizer)


def unigram() -> PreTrainedTokenizerFast:
    """As T5's: the Metaspace decoder."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=60, special_tokens=SPECIALS, unk_token="<unk>")
    tokenizer.train_from_iterator(CORPUS, trainer)
    return wrapped(tokenizer)


def wordpiece() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.WordPiece(cleanup=False)
    tokenizer.train_from_iterator(CORPUS, trainers.WordPieceTrainer(vocab_size=120, special_tokens=SPECIALS))
    return wrapped(tokenizer)


class SlowTokenizer(PreTrainedTokenizer):
    """A tokenizer in Python, decoding as transformers' sentencepiece base class does."""

    def __init__(self, **kwargs):
        self.pieces = [*SPECIALS, "▁", "▁a", "b", "你", "▁▁", "c"]
        super().__init__(unk_token="<unk>", bos_token="<s>", eos_token="</s>", **kwargs)

    @property
    def vocab_size(self):
        return len(self.pieces)

    def get_vocab(self):
        return {piece: index for index, piece in enumerate(self.pieces)}

    def _convert_token_to_id(self, token):
        return self.get_vocab().get(token, 0)

    def _convert_id_to_token(self, index):
        return self.pieces[index]

    def convert_tokens_to_string(self, tokens):
        return "".join(tokens).replace("▁", " ").strip()


BUILDERS = {builder.__name__: builder for builder in (byte_level, sentencepiece, unigram, wordpiece, SlowTokenizer)}
KINDS = list(BUILDERS)


@functools.cache
def tokenizer_of(kind: str):
    return BUILDERS[kind]()
