"""Small tokenizers of each kind that checkpoints come with."""

from pathlib import Path

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from tests.tiny import write_tokenizer

DEMO = Path(__file__).parents[2] / "models" / "demo"
SPECIAL = ["<s>", "</s>", "<unk>"]
WORDS = ["the", "name", '"', '":', "true", "12", "http", "{", "}", "[", "]", ",", "é", "日本", '{"', '"}', "\n"]


def characters(folder):
    write_tokenizer(folder)
    return AutoTokenizer.from_pretrained(folder)


def byte_level(words=WORDS):
    """Every byte, some words, a special token and an added one that is text; ids out of order."""
    table = pre_tokenizers.ByteLevel.alphabet()
    spell = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    pieces = sorted(table) + [spell.pre_tokenize_str(word)[0][0] for word in [*words, " the", " name", " {"]]
    vocabulary = {piece: index for index, piece in enumerate(dict.fromkeys([*SPECIAL, *pieces]))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = spell
    tokenizer.decoder = decoders.ByteLevel()
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    wrapped.add_tokens(["<think>"])
    return wrapped


def sentencepiece(words=WORDS):
    """`▁` for a space and `<0x0A>` for a byte, as Llama 2's and Gemma's."""
    pieces = [*words, *(chr(code) for code in range(33, 127)), "▁", "▁the", "▁name", "▁▁"]
    everything = dict.fromkeys([*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), *pieces])
    vocabulary = {piece: index for index, piece in enumerate(everything)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def word_piece():
    """A tokenizer whose text is not the concatenation of its tokens."""
    vocabulary = {piece: index for index, piece in enumerate([*SPECIAL, "the", "##s", "a", "b"])}
    tokenizer = Tokenizer(models.WordPiece(vocab=vocabulary, unk_token="<unk>"))
    tokenizer.decoder = decoders.WordPiece()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


def make(kind, folder):
    if kind == "demo":
        return AutoTokenizer.from_pretrained(DEMO)
    return {"characters": lambda: characters(folder), "byte level": byte_level, "sentencepiece": sentencepiece}[kind]()


KINDS = ("characters", "byte level", "sentencepiece", "demo")
