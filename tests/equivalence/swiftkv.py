"""SwiftKV checkpoints, and a plain forward of them written from the published description (arXiv 2410.03960, §3.2)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from tests.equivalence.tiny_models import NEW_TOKENS, VOCABULARY, Reference, make_checkpoint, make_prompts

SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 88,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 128,
    "num_key_value_layers": 3,
    "bos_token_id": None,
    "eos_token_id": None,
    "rope_parameters": {"rope_type": "default", "rope_theta": 100.0},
}


def swiftkv_config(**changes: Any) -> Any:
    """The config of a tiny SwiftKV Llama, which transformers' `Auto` classes know afterwards."""
    from ulysses_infer.model.definitions.llama_swiftkv import LlamaSwiftKVConfig
    from ulysses_infer.model.definitions.registration import register_definitions

    register_definitions()
    return LlamaSwiftKVConfig(**{**SHAPE, **changes})


class PlainSwiftKV:
    """The forward of a whole text, every token through every layer."""

    def __init__(self, model: Any) -> None:
        self.config = model.config
        self.weights = {name: tensor.detach().float() for name, tensor in model.state_dict().items()}

    @torch.inference_mode()
    def log_probabilities(self, tokens: list[int]) -> torch.Tensor:
        """[n, V], of the token after each of `tokens`."""
        return self._linear(self.hidden(tokens), "lm_head").log_softmax(dim=-1)

    @torch.inference_mode()
    def hidden(self, tokens: list[int]) -> torch.Tensor:
        """[n, D], what the vocabulary head reads of each of `tokens`."""
        config, first = self.config, self.config.num_key_value_layers
        hidden = self.weights["model.embed_tokens.weight"][tokens]
        shared = {}
        for layer in range(config.num_hidden_layers):
            prefix = f"model.layers.{layer}."
            if layer == first:
                shared = self._later_keys(hidden)
            normed = self._norm(hidden, f"{prefix}input_layernorm")
            suffix = "" if layer < first else "_swiftkv"
            query = self._rotated(self._project(normed, f"{prefix}self_attn.q_proj{suffix}"))
            if layer < first:
                key = self._rotated(self._project(normed, f"{prefix}self_attn.k_proj"))
                value = self._project(normed, f"{prefix}self_attn.v_proj")
            else:
                key, value = shared[layer]
            attended = self._attention(query, key, value)
            hidden = hidden + self._linear(attended, f"{prefix}self_attn.o_proj")
            hidden = hidden + self._feed_forward(self._norm(hidden, f"{prefix}post_attention_layernorm"), prefix)
        return self._norm(hidden, "model.norm")

    def reference(self, folder: Path, prompts: list[list[int]], new_tokens: int = NEW_TOKENS) -> Reference:
        """Greedy tokens and the log-probability of every token but the first."""
        tokens, logprobs = [], []
        for prompt in prompts:
            whole = list(prompt)
            for _ in range(new_tokens):
                whole.append(int(self.log_probabilities(whole)[-1].argmax()))
            scores = self.log_probabilities(whole)[:-1].gather(1, torch.tensor(whole[1:])[:, None])
            tokens.append(whole[len(prompt) :])
            logprobs.append(scores[:, 0].tolist())
        return Reference(folder, prompts, tokens, logprobs)

    def _later_keys(self, hidden: torch.Tensor) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
        """Keys and values of the later layers, all from one hidden state; groups share those of their first layer."""
        config, shared = self.config, self._norm(hidden, "model.norm_swiftkv")
        found = {}
        for number, layer in enumerate(range(config.num_key_value_layers, config.num_hidden_layers)):
            prefix = f"model.layers.{layer}.self_attn."
            if number % config.key_value_group_size == 0:
                key = self._rotated(self._project(shared, f"{prefix}k_proj_swiftkv"))
                made = key, self._project(shared, f"{prefix}v_proj_swiftkv")
            found[layer] = made
        return found

    def _linear(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return F.linear(x, self.weights[f"{name}.weight"], self.weights.get(f"{name}.bias"))

    def _project(self, x: torch.Tensor, name: str) -> torch.Tensor:
        """x: [n, D]; returns [n, h, d]."""
        return self._linear(x, name).unflatten(-1, (-1, self.config.head_dim))

    def _norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return F.rms_norm(x, (x.shape[-1],), self.weights[f"{name}.weight"], self.config.rms_norm_eps)

    def _feed_forward(self, x: torch.Tensor, prefix: str) -> torch.Tensor:
        gate, up = (self._linear(x, f"{prefix}mlp.{name}_proj") for name in ("gate", "up"))
        return self._linear(F.silu(gate) * up, f"{prefix}mlp.down_proj")

    def _rotated(self, heads: torch.Tensor) -> torch.Tensor:
        """heads: [n, h, d], the token at each position."""
        width = self.config.head_dim
        frequencies = self.config.rope_parameters["rope_theta"] ** (-torch.arange(0, width, 2) / width)
        angles = torch.arange(len(heads))[:, None, None] * frequencies
        first, second = heads.split(width // 2, dim=-1)
        return torch.cat(
            (first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin()), dim=-1
        )

    def _attention(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Causal; query: [n, Hq, d]; key, value: [n, Hkv, d]; returns [n, Hq * d]."""
        repeats = query.shape[1] // key.shape[1]
        key, value = (each.repeat_interleave(repeats, dim=1) for each in (key, value))
        scores = torch.einsum("qhd,khd->hqk", query, key) * self.config.head_dim**-0.5
        scores = scores.masked_fill(torch.ones(len(query), len(query)).triu(1).bool(), -torch.inf)
        return torch.einsum("hqk,khd->qhd", scores.softmax(dim=-1), value).flatten(1)


def make_swiftkv_reference(folder: Path, **changes: Any) -> Reference:
    """A tiny checkpoint in `folder`, with the plain forward's answers."""
    return PlainSwiftKV(make_checkpoint(swiftkv_config(**changes), folder)).reference(folder, make_prompts())
