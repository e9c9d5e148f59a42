"""Sizes of recurrent layers, by the fields of their configs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

RECURRENT_KINDS = frozenset({"linear_attention", "mamba", "mamba2", "recurrent", "conv", "hybrid"})
"""Names in `layer_types` of layers with states; `hybrid` ones attend too."""
KINDS_WITHOUT_ATTENTION = (RECURRENT_KINDS - {"hybrid"}) | {"mlp", "moe"}


@dataclass(frozen=True)
class RecurrentSizes:
    """One recurrent layer, over all heads, in elements."""

    inputs: int
    """Outputs of its input projections together."""
    outputs: int
    """Inputs of its output projection."""
    state: int
    """Recurrent state of one sequence, in float32."""
    convolution: int
    """Inputs of the short convolution that one sequence keeps."""

    def weights(self, hidden_size: int) -> int:
        """Weights of its projections."""
        return hidden_size * (self.inputs + self.outputs)

    def state_bytes(self, item: int = 2) -> int:
        """Bytes of one sequence's states; item: bytes of an activation."""
        return 4 * self.state + item * self.convolution


NO_STATES = RecurrentSizes(0, 0, 0, 0)


def recurrent_sizes(text: Any, kinds: frozenset[str]) -> RecurrentSizes | None:
    """The sizes in a transformers config with layers of these kinds; None if they are of no known form."""
    for form in (_delta_net, _kimi, _lightning, _recurrent_block, _short_convolution, _mamba2, _mamba):
        found = form(text, kinds)
        if found is not None:
            return found
    return None


def _get(text: Any, *names: str) -> int:
    """The first of these fields that is set; 0 if none is."""
    return next((int(value) for name in names if isinstance(value := getattr(text, name, None), int) and value), 0)


def _delta_net(text: Any, kinds: frozenset[str]) -> RecurrentSizes | None:
    """Gated delta rule: Qwen3-Next, Qwen 3.5, Olmo Hybrid."""
    heads, key = _get(text, "linear_num_value_heads"), _get(text, "linear_key_head_dim")
    value = _get(text, "linear_value_head_dim")
    if not heads or not value:
        return None
    keys, values = _get(text, "linear_num_key_heads") * key, heads * value
    kept = _get(text, "linear_conv_kernel_dim")
    return RecurrentSizes(2 * keys + 2 * values + 2 * heads, values, heads * key * value, kept * (2 * keys + values))


def _kimi(text: Any, kinds: frozenset[str]) -> RecurrentSizes | None:
    """Kimi delta attention; its gates have one low-rank pair of products each."""
    heads, width = _get(text, "linear_num_heads"), _get(text, "linear_head_dim")
    if not heads or not width:
        return None
    kept = _get(text, "linear_conv_kernel_dim")
    inputs = 3 * heads * width + heads + 2 * width
    return RecurrentSizes(inputs, heads * width, heads * width * width, kept * 3 * heads * width)


def _lightning(text: Any, kinds: frozenset[str]) -> RecurrentSizes | None:
    """MiniMax's lightning attention."""
    if not hasattr(text, "linear_attn_alpha_factor"):
        return None
    heads = text.num_attention_heads
    width = _get(text, "head_dim") or text.hidden_size // heads
    return RecurrentSizes(4 * heads * width, heads * width, heads * width * width, 0)


def _recurrent_block(text: Any, kinds: frozenset[str]) -> RecurrentSizes | None:
    """RecurrentGemma."""
    width = _get(text, "lru_width")
    return RecurrentSizes(2 * width, width, width, _get(text, "conv1d_width") * width) if width else None


def _short_convolution(text: Any, kinds: frozenset[str]) -> RecurrentSizes | None:
    """LFM 2."""
    kept = _get(text, "conv_L_cache")
    hidden = text.hidden_size
    return RecurrentSizes(3 * hidden, hidden, 0, kept * hidden) if kept and "conv" in kinds else None


def _mamba2(text: Any, kinds: frozenset[str]) -> RecurrentSizes | None:
    """Mamba 2: Bamba, Granite 4, Falcon H1, Nemotron H, Zamba 2."""
    heads = _get(text, "mamba_n_heads", "mamba_num_heads", "n_mamba_heads")
    width = _get(text, "mamba_d_head", "mamba_head_dim", "mamba_headdim")
    if not heads or not width:
        return None
    inner, state = heads * width, _get(text, "mamba_d_state", "ssm_state_size", "state_size")
    groups = _get(text, "mamba_n_groups", "mamba_ngroups", "n_groups") or 1
    mixed = inner + 2 * groups * state
    kept = _get(text, "mamba_d_conv", "conv_kernel")
    return RecurrentSizes(inner + mixed + heads, inner, inner * state, kept * mixed)


def _mamba(text: Any, kinds: frozenset[str]) -> RecurrentSizes | None:
    """Mamba: Jamba, Zamba, Falcon Mamba."""
    state = _get(text, "mamba_d_state", "state_size")
    if not state:
        return None
    inner = _get(text, "mamba_expand", "expand") * text.hidden_size
    return RecurrentSizes(2 * inner, inner, inner * state, _get(text, "mamba_d_conv", "conv_kernel") * inner)
