"""Rotary positions (Su et al. 2021, arXiv 2104.09864) of heads, in the two orders of columns that models have."""

from __future__ import annotations

import torch


def rotate_halves(heads: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> torch.Tensor:
    """Rotate the first r columns, of which columns i and i + r/2 are a pair.

    heads: [1, H, t, d]; cosine, sine: [1, t, r]; returns [1, H, t, d].
    """
    first, second = heads[..., : cosine.shape[-1]].chunk(2, dim=-1)
    turned = torch.cat((-second, first), dim=-1)
    return _with_rest(heads, turned, cosine[:, None], sine[:, None])


def rotate_pairs(heads: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> torch.Tensor:
    """Rotate the first r columns, of which columns 2i and 2i + 1 are a pair.

    heads: [1, H, t, d]; cosine, sine: [1, t, r/2]; returns [1, H, t, d].
    """
    cosine, sine = (each[:, None].repeat_interleave(2, dim=-1) for each in (cosine, sine))
    pairs = heads[..., : cosine.shape[-1]].unflatten(-1, (-1, 2))
    turned = torch.stack((-pairs[..., 1], pairs[..., 0]), dim=-1).flatten(-2)
    return _with_rest(heads, turned, cosine, sine)


def rotate_last_pairs(heads: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> torch.Tensor:
    """`rotate_pairs` of the last r columns, in float32."""
    rotated = heads[..., -2 * cosine.shape[-1] :]
    turned = rotate_pairs(rotated.float(), cosine, sine).to(heads.dtype)
    return torch.cat((heads[..., : heads.shape[-1] - turned.shape[-1]], turned), dim=-1)


def _with_rest(heads: torch.Tensor, turned: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> torch.Tensor:
    width = turned.shape[-1]
    rotated = heads[..., :width] * cosine + turned * sine
    return rotated if width == heads.shape[-1] else torch.cat((rotated, heads[..., width:]), dim=-1)
