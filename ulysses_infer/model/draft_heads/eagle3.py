"""EAGLE-3: a head trained beside a model, which reads the hidden states of three of its layers (arXiv 2503.01840)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaMLP,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
)

from ulysses_infer.errors import CheckpointError, UnsupportedModelError, kind_and_line
from ulysses_infer.model.draft_heads.module import HeadModule, InputProjection
from ulysses_infer.model.loading.files import read_json_object
from ulysses_infer.model.sampling.head import ShardedHead

ARCHITECTURES = ("LlamaForCausalLMEagle3", "Eagle3LlamaForCausalLM", "Eagle3Speculator", "Eagle3DraftModel")
INNER_CONFIG = "transformer_layer_config"
"""Where checkpoints of the library speculators keep the sizes of the layer."""
LAYER_NAMES = ("midlayer.", "layers.0.")
"""Prefixes of the layer's tensors, by publisher."""
DRAFT_TO_TARGET = "d2t"


class Eagle3Config:
    """What config.json of an EAGLE-3 head says."""

    def __init__(self, folder: Path) -> None:
        """Raises `CheckpointError` or `UnsupportedModelError`."""
        values = read_json_object(folder / "config.json")
        names = values.get("architectures") or ()
        if not any(name in ARCHITECTURES for name in names):
            raise UnsupportedModelError(
                f"speculation.model {str(folder)!r} is no EAGLE-3 head: its architecture is "
                f"{', '.join(names) or 'unnamed'}; known are {', '.join(ARCHITECTURES)}"
            )
        try:
            self.layer = LlamaConfig.from_dict(values.get(INNER_CONFIG) or values)
        except Exception as error:  # transformers does not check every value
            raise CheckpointError(f"{folder / 'config.json'} cannot be read: {kind_and_line(error)}") from error
        eagle = values.get("eagle_config") or {}
        if self.layer.num_hidden_layers != 1 or not eagle.get("use_aux_hidden_state", True):
            raise UnsupportedModelError(
                f"speculation.model {str(folder)!r}: only EAGLE-3 heads with one layer that read hidden states of "
                "three layers are supported"
            )
        self.vocab_size: int = int(values.get("vocab_size") or self.layer.vocab_size)
        self.draft_vocab_size: int = int(values.get("draft_vocab_size") or self.vocab_size)
        self.target_hidden_size: int = int(values.get("target_hidden_size") or self.layer.hidden_size)
        self.normalises_residual: bool = bool(values.get("norm_before_residual", False))
        self._layers = eagle.get("eagle_aux_hidden_state_layer_ids") or values.get("eagle_aux_hidden_state_layer_ids")

    def read_layers(self, num_layers: int) -> tuple[int, ...]:
        """The layers of the served model whose inputs the head reads."""
        return tuple(self._layers or (2, num_layers // 2, num_layers - 3))


class _Layer(nn.Module):
    """A Llama layer whose attention reads a token beside a hidden state."""

    def __init__(self, config: Any, normalises_residual: bool) -> None:
        super().__init__()
        width = config.hidden_size
        self._normalises_residual = normalises_residual
        self.self_attn = LlamaAttention(config, 0)
        for name in ("q_proj", "k_proj", "v_proj"):
            own = getattr(self.self_attn, name)
            setattr(self.self_attn, name, nn.Linear(2 * width, own.out_features, bias=own.bias is not None))
        self.mlp = LlamaMLP(config)
        self.input_layernorm, self.hidden_norm, self.post_attention_layernorm = (
            LlamaRMSNorm(width, config.rms_norm_eps) for _ in range(3)
        )

    def forward(
        self, token: torch.Tensor, hidden: torch.Tensor, position_ids: torch.Tensor, rotary: Any
    ) -> torch.Tensor:
        """token, hidden: [1, t, D]; returns [1, t, D]."""
        normed = self.hidden_norm(hidden)
        residual = normed if self._normalises_residual else hidden
        attended, _ = self.self_attn(
            hidden_states=torch.cat([self.input_layernorm(token), normed], dim=-1),
            position_embeddings=rotary,
            attention_mask=None,
            position_ids=position_ids,
            past_key_values=None,
            use_cache=False,
        )
        residual = residual + attended
        output: torch.Tensor = residual + self.mlp(self.post_attention_layernorm(residual))
        return output


class Eagle3Module(HeadModule):
    """An EAGLE-3 head: the fusion of three hidden states, one layer, and a vocabulary of its own."""

    def __init__(self, config: Eagle3Config, num_features: int, embedding: nn.Module, has_embedding: bool) -> None:
        """num_features: hidden states that it reads. embedding: of the served model. has_embedding: whether the
        checkpoint brings another."""
        super().__init__(config.layer, embedding)
        width = config.layer.hidden_size
        with torch.device("meta"):
            self.fc = InputProjection(num_features * config.target_hidden_size, width)
            self.layer = _Layer(config.layer, config.normalises_residual)
            self.norm = LlamaRMSNorm(width, config.layer.rms_norm_eps)
            self.lm_head = nn.Linear(width, config.draft_vocab_size, bias=False)
            if has_embedding:
                self.embed_tokens = nn.Embedding(config.vocab_size, width)
            self.register_buffer(DRAFT_TO_TARGET, torch.zeros(config.draft_vocab_size, dtype=torch.int64))
        self.rotary_emb = LlamaRotaryEmbedding(config.layer)

    def get_input_embeddings(self) -> nn.Module:
        """See `HeadModule.get_input_embeddings`."""
        return self.embed_tokens if hasattr(self, "embed_tokens") else super().get_input_embeddings()

    def get_output_embeddings(self) -> nn.Module:
        """See `HeadModule.get_output_embeddings`."""
        return self.lm_head

    @property
    def vocabulary_head(self) -> ShardedHead:
        """Its own."""
        head: Any = self.lm_head
        return head

    def fuse(self, hidden: torch.Tensor) -> torch.Tensor:
        """See `HeadModule.fuse`. hidden: [t, 3 * D of the served model]."""
        fused: torch.Tensor = self.fc(hidden)
        return fused

    def states(self, input_ids: torch.Tensor, position_ids: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """See `HeadModule.states`."""
        token = self.get_input_embeddings()(input_ids)
        states: torch.Tensor = self.layer(token, hidden, position_ids, self.rotary_emb(token, position_ids))
        return states

    def normed(self, states: torch.Tensor) -> torch.Tensor:
        """See `HeadModule.normed`."""
        normed: torch.Tensor = self.norm(states)
        return normed

    def tokens_of(self, drafted: torch.Tensor) -> torch.Tensor:
        """See `HeadModule.tokens_of`. The checkpoint stores how far each token is moved."""
        offsets: torch.Tensor = getattr(self, DRAFT_TO_TARGET)
        return drafted + offsets[drafted]


def parameter_of(key: str) -> str | None:
    """The parameter of `Eagle3Module` that the checkpoint's `key` is; None if it is none."""
    key = key.removeprefix("model.")
    for prefix in LAYER_NAMES:
        if key.startswith(prefix):
            return f"layer.{key.removeprefix(prefix)}"
    is_known = key.split(".")[0] in ("fc", "norm", "lm_head", "embed_tokens", DRAFT_TO_TARGET)
    return key if is_known else None
