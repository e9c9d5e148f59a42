"""A tiny Llama with a tokenizer, and matching engine settings, for all tests but those of the models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.equivalence.tiny_models import make_checkpoint

SPECIAL = ["<pad>", "<s>", "</s>"]
VOCABULARY = [*SPECIAL, *(chr(code) for code in range(32, 127)), "<unk>"]  # 99 ids: uneven over 2, 4 and 8 ranks
EOS = SPECIAL.index("</s>")
SHAPE: dict[str, Any] = {
    "vocab_size": len(VOCABULARY),
    "hidden_size": 64,
    "intermediate_size": 88,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": None,
    "eos_token_id": EOS,
    "pad_token_id": None,
}
CHAT_TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "[{{ m.role }}]{{ m.content }}{% endfor %}{% if add_generation_prompt %}[a]{% endif %}"
)


def tiny_config(**changes: Any) -> Any:
    """transformers' config of the tiny Llama."""
    from transformers import LlamaConfig

    return LlamaConfig(**{**SHAPE, **changes})


def tiny_llama(folder: Path, tokenizer: bool = True, **changes: Any) -> Any:
    """Save the tiny Llama (float32, random) to `folder`; returns transformers' model of it."""
    model = make_checkpoint(tiny_config(**changes), folder)
    if tokenizer:
        write_tokenizer(folder)
    return model


def write_tokenizer(folder: Path) -> None:
    """One token per printable ASCII character: every text has an obvious encoding."""
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    ids = {token: index for index, token in enumerate(VOCABULARY)}
    characters = Tokenizer(models.BPE(vocab=ids, merges=[], unk_token="<unk>"))
    characters.decoder = decoders.Fuse()
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=characters,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        chat_template=CHAT_TEMPLATE,
    )
    wrapped.save_pretrained(folder)


def encode(text: str) -> list[int]:
    """Token ids of `text`."""
    return [VOCABULARY.index(character) for character in text]


def settings(sp: int = 1, tp: int = 1, **changes: Any) -> dict[str, Any]:
    """Keyword arguments of `init_inference`: every mode of the base, a small cache, one thread. Dotted keys win."""
    modes = [[s, sp * tp // s] for s in range(1, sp + 1) if sp % s == 0]
    plain: dict[str, Any] = {
        "parallel.sp": sp,
        "parallel.tp": tp,
        "parallel.modes": modes,
        "cache.num_blocks": 64,
        "cache.block_size": 4,
        "scheduler.max_num_seqs": 8,
        "scheduler.max_num_batched_tokens": 32,
        "runtime.threads_per_rank": 1,
        "runtime.device": "cpu",
    }
    chosen = {**plain, **changes}
    num_blocks, whole = chosen["cache.num_blocks"], SHAPE["max_position_embeddings"]
    if num_blocks is not None and num_blocks * chosen["cache.block_size"] < whole:
        chosen.setdefault("model.max_model_len", num_blocks * chosen["cache.block_size"])
    return chosen
