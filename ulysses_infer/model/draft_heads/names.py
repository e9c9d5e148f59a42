"""How checkpoints name the tensors of their multi-token-prediction modules, by family."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from ulysses_infer.model.loading.files import TensorSource
from ulysses_infer.parallel.layout import Span

LAYER_PARTS = ("self_attn", "mlp", "input_layernorm", "post_attention_layernorm")
"""The parts of a decoder layer, in all of these families."""


@dataclass(frozen=True)
class HeadNames:
    """The names of a family's first multi-token-prediction module, and in what its forward differs.

    All of these modules compute `layer(projection([token_norm(embedding), hidden_norm(hidden state)]))` of a token and
    the hidden state before it, then an output norm and the vocabulary head (DeepSeek-V3, arXiv 2412.19437 §2.2).
    """

    prefix: str
    """Of all its tensors; `{layers}` is the number of decoder layers."""
    token_norm: str
    hidden_norm: str
    projection: str
    output_norm: str
    layer: str = ""
    """Of the decoder layer, after `prefix`."""
    hidden_first: bool = False
    """Whether the projection's first half reads the hidden state, not the token."""
    hands_on_normed: bool = False
    """Whether the next token is drafted from the state after the output norm, not before."""

    def parameter_of(self, key: str, num_layers: int) -> str | None:
        """The parameter of `MtpModule` that the checkpoint's `key` is; None if it is none.

        The embedding and the head that some checkpoints store again are those of the served model.
        """
        prefix = self.prefix.format(layers=num_layers)
        if not key.startswith(prefix):
            return None
        rest = key.removeprefix(prefix)
        for own in ("token_norm", "hidden_norm", "projection", "output_norm"):
            name = getattr(self, own)
            if rest.startswith(f"{name}."):
                return own + rest.removeprefix(name)
        inner = rest.removeprefix(self.layer)
        is_inner = rest.startswith(self.layer) and inner.split(".")[0] in LAYER_PARTS
        return f"layer.{inner}" if is_inner else None

    def original_of(self, name: str, num_layers: int) -> str:
        """The name that the checkpoint's quantization config has for the module `name` of `MtpModule`."""
        first, _, rest = name.partition(".")
        prefix = self.prefix.format(layers=num_layers)
        if first == "layer":
            return f"{prefix}{self.layer}{rest}"
        return prefix + getattr(self, first)


NEXTN = HeadNames("model.layers.{layers}.", "enorm", "hnorm", "eh_proj", "shared_head.norm")
QWEN3_NEXT = HeadNames(
    "mtp.", "pre_fc_norm_embedding", "pre_fc_norm_hidden", "fc", "norm", layer="layers.0.", hands_on_normed=True
)
MIMO = HeadNames(
    "model.mtp_layers.0.",
    "token_layernorm",
    "hidden_layernorm",
    "input_proj",
    "final_layernorm",
    hidden_first=True,
    hands_on_normed=True,
)
FAMILIES: dict[str, HeadNames] = {
    "deepseek_v3": NEXTN,
    "glm4_moe": NEXTN,
    "qwen3_next": QWEN3_NEXT,
    "qwen2": MIMO,  # MiMo-7B is a Qwen 2 with such a module
}
"""By model type."""


class RenamedSource:
    """A checkpoint's tensors under the names of a head's parameters. Implements `TensorSource`."""

    def __init__(self, source: TensorSource, keys: dict[str, str]) -> None:
        """keys: the checkpoint's key of each name."""
        self._source, self._keys = source, keys

    def keys(self) -> Iterable[str]:
        """The new names."""
        return self._keys.keys()

    def shape(self, key: str) -> tuple[int, ...]:
        """The shape of the whole tensor."""
        return self._source.shape(self._keys[key])

    def read(self, key: str, kept: tuple[int, list[Span]] | None) -> torch.Tensor:
        """See `TensorSource.read`."""
        return self._source.read(self._keys[key], kept)
