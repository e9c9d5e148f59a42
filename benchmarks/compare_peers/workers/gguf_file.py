"""A Llama or Qwen2 checkpoint as a GGUF file, tensors as they are: what llama.cpp reads. Needs numpy and gguf."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

BLOCK_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
OUTER_NAMES = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def gguf_name(name: str) -> str:
    """The GGUF name of a Llama or Qwen2 tensor of transformers."""
    stem, _, kind = name.rpartition(".")
    if stem in OUTER_NAMES:
        return f"{OUTER_NAMES[stem]}.{kind}"
    layer, _, inner = stem.removeprefix("model.layers.").partition(".")
    return f"blk.{layer}.{BLOCK_NAMES[inner]}.{kind}"


def interleaved(weight: Any, num_heads: int) -> Any:
    """Rows of a query or key projection [heads * d, D] in llama.cpp's order: rotary pairs side by side, not halves."""
    rows, width = weight.shape
    return weight.reshape(num_heads, 2, rows // num_heads // 2, width).swapaxes(1, 2).reshape(rows, width)


def tensors(folder: Path) -> Iterator[tuple[str, Any]]:
    """Every bfloat16 tensor of a checkpoint, as the bits [..] uint16."""
    import numpy as np

    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header: dict[str, Any] = json.loads(file.read(size))
        data = np.memmap(path, np.uint8, "r", offset=8 + size)
        for name, entry in header.items():
            if name != "__metadata__":
                first, last = entry["data_offsets"]
                yield name, data[first:last].view(np.uint16).reshape(entry["shape"])


def write(folder: Path, target: Path, dtype: str) -> None:
    """Write `target` from the checkpoint in `folder`, in bfloat16 or float32; norms are float32 for llama.cpp."""
    import gguf
    import numpy as np

    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    heads, key_value_heads = config["num_attention_heads"], config["num_key_value_heads"]
    unfinished = target.with_suffix(".unfinished")
    writer = gguf.GGUFWriter(unfinished, config["model_type"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(key_value_heads)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_rope_dimension_count(config["hidden_size"] // heads)
    writer.add_tokenizer_model("none")
    for name, bits in tensors(folder):
        if config["model_type"] == "llama" and ("q_proj" in name or "k_proj" in name):  # Qwen2's pairs are halves
            bits = interleaved(bits, heads if "q_proj" in name else key_value_heads)
        if dtype == "bfloat16" and bits.ndim > 1:
            contiguous = np.ascontiguousarray(bits)
            writer.add_tensor(gguf_name(name), contiguous.view(np.uint8), raw_dtype=gguf.GGMLQuantizationType.BF16)
        else:
            writer.add_tensor(gguf_name(name), (bits.astype(np.uint32) << 16).view(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    unfinished.rename(target)
