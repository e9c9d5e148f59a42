"""Which prefixes each replica has probably cached, judged by the prompts that were sent to it.

Source: prefix-affine routing as in SGLang's router (approximate trees per worker), here with the engine's own block
hashes. Asking the replicas would be exact, but costs a message for each prompt.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Sequence

from ulysses_infer.cache.prefix import extend_block_hashes
from ulysses_infer.server.messages import Submit


class PrefixIndex:
    """Block hashes of recent prompts by replica. Each replica's are bounded by the size of its cache."""

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        self._blocks: dict[str, OrderedDict[bytes, None]] = {}

    def hashes_of(self, submit: Submit) -> list[bytes]:
        """The hashes of a prompt's full blocks. Prompts with another adapter or cache salt share none."""
        hashes: list[bytes] = []
        extend_block_hashes(hashes, submit.token_ids, self._block_size, f"{submit.adapter or ''} {submit.cache_salt}")
        return hashes

    def num_cached_tokens(self, replica: str, hashes: Sequence[bytes]) -> int:
        """The length of the longest prefix of a prompt that a replica has probably cached."""
        known = self._blocks.get(replica) or ()
        return self._block_size * next((n for n, each in enumerate(hashes) if each not in known), len(hashes))

    def num_blocks(self, replica: str) -> int:
        """How many blocks a replica has probably cached."""
        return len(self._blocks.get(replica, ()))

    def add(self, replica: str, hashes: Sequence[bytes], capacity: int) -> None:
        """A prompt was sent to a replica, whose cache has `capacity` blocks; the least recently used are forgotten.

        The last blocks of a prompt are forgotten first: a cached block is useless without those before it.
        """
        blocks = self._blocks.setdefault(replica, OrderedDict())
        for each in reversed(hashes):
            blocks[each] = None
            blocks.move_to_end(each)
        while len(blocks) > capacity:
            blocks.popitem(last=False)

    def keep(self, replicas: Collection[str]) -> None:
        """Forget all other replicas."""
        self._blocks = {replica: blocks for replica, blocks in self._blocks.items() if replica in replicas}
