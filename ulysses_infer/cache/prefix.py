"""Hash chains over full blocks: equal hashes mean equal prefixes.

Source: hash-based automatic prefix caching as in vLLM (Kwon et al., "Efficient Memory Management for Large
Language Model Serving with PagedAttention", SOSP 2023, and its prefix caching design document).
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence

DIGEST_SIZE = 32
"""Bytes. Wide enough that a client cannot craft a prompt that collides with another's cached blocks."""


def root_hash(salt: str = "") -> bytes:
    """The parent of a sequence's first block. Sequences of different `salt` share nothing."""
    return hashlib.blake2b(salt.encode(), digest_size=DIGEST_SIZE).digest()


def prefix_salt(salt: str, adapter: str | None) -> str:
    """The salt of a request's blocks: what an adapter computed is of no use without it, nor without the user's salt."""
    given = f"salt {salt}" if salt else ""
    return given if adapter is None else f"adapter {adapter!r} {given}"


def block_hash(parent: bytes, token_ids: Sequence[int]) -> bytes:
    """The name of a full block: `token_ids` after the block named `parent`."""
    return hashlib.blake2b(parent + array("q", token_ids).tobytes(), digest_size=DIGEST_SIZE).digest()


def extend_block_hashes(hashes: list[bytes], token_ids: Sequence[int], block_size: int, salt: str = "") -> None:
    """Append to `hashes` the name of every full block in `token_ids`, the tokens that follow the blocks named
    so far.

    An unfilled last block gets no name.
    """
    parent = hashes[-1] if hashes else root_hash(salt)
    for start in range(0, len(token_ids) - block_size + 1, block_size):
        parent = block_hash(parent, token_ids[start : start + block_size])
        hashes.append(parent)
