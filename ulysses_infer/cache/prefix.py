"""Hash chains over full blocks: equal hashes mean equal prefixes.

Source: hash-based automatic prefix caching as in vLLM (Kwon et al., "Efficient Memory Management for Large
Language Model Serving with PagedAttention", SOSP 2023, and its prefix caching design document).
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence

DIGEST_SIZE = 32
"""Bytes. Wide enough that a client cannot craft a prompt whose blocks collide with another's."""


def root_hash(salt: str = "") -> bytes:
    """The parent hash of a sequence's first block. Sequences of different `salt` share nothing."""
    return hashlib.blake2b(salt.encode(), digest_size=DIGEST_SIZE).digest()


def prefix_salt(salt: str, adapter: int) -> str:
    """The salt of a request's blocks: its own salt and the number of its adapter, because adapters change keys and
    values."""
    given = f"salt {salt}" if salt else ""
    return f"adapter {adapter} {given}" if adapter else given


def block_hash(parent: bytes, token_ids: Sequence[int]) -> bytes:
    """The hash of a full block: `token_ids` after the block with hash `parent`."""
    return hashlib.blake2b(parent + array("q", token_ids).tobytes(), digest_size=DIGEST_SIZE).digest()


def extend_block_hashes(hashes: list[bytes], token_ids: Sequence[int], block_size: int, salt: str = "") -> None:
    """Append to `hashes` the hash of every full block in `token_ids`, the tokens after the blocks hashed so far.

    The last block is left out if it is not full.
    """
    parent = hashes[-1] if hashes else root_hash(salt)
    for start in range(0, len(token_ids) - block_size + 1, block_size):
        parent = block_hash(parent, token_ids[start : start + block_size])
        hashes.append(parent)
