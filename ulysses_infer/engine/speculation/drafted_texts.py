"""What the cache of a draft model holds of each request: it follows the known tokens, and goes back to them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Container
from dataclasses import dataclass, field

from ulysses_infer.cache.pools import BlockPools, GroupBlockIds
from ulysses_infer.engine.request import Request


@dataclass(eq=False)
class DraftedText:
    """One request's text in the cache of the draft model."""

    request: Request
    tables: GroupBlockIds
    num_blocks: int
    """Blocks of the text so far: the end of every table."""
    num_cached: int
    """Known tokens of the request that are in the cache."""
    ahead: list[int] = field(default_factory=list)
    """Tokens in the cache after them, which were drafted: known ones by now, or wrong."""
    num_published: int = 0
    """Leading blocks in the prefix cache."""
    is_new: bool = True
    """Whether the ranks have no block table of it yet."""

    def settle(self) -> None:
        """Keep what was drafted as far as it has become known. The last known token is always computed again: the
        logits after it are needed."""
        last, request = self.request.num_tokens - 1, self.request
        count = max(0, min(last - self.num_cached, len(self.ahead)))
        known = request.token_ids_from(self.num_cached, self.num_cached + count)
        differing = (
            place for place, (token, drafted) in enumerate(zip(known, self.ahead, strict=False)) if token != drafted
        )
        self.num_cached = min(last, self.num_cached + next(differing, count))
        self.ahead = []


class DraftedTexts:
    """The texts in the cache of the draft model, on rank 0. Those used least recently make room for others."""

    def __init__(self, pools: BlockPools, max_texts: int) -> None:
        """max_texts: for which the ranks have block tables."""
        self._pools, self._max_texts = pools, max_texts
        self._texts: OrderedDict[int, DraftedText] = OrderedDict()
        self._dropped: list[int] = []

    def __len__(self) -> int:
        return len(self._texts)

    def num_missing(self, request: Request) -> int:
        """Known tokens of `request` that are not in the cache, as far as that is known."""
        text = self._texts.get(request.index)
        return request.num_tokens - (0 if text is None else text.num_cached + len(text.ahead))

    def open(self, request: Request, busy: Container[int]) -> DraftedText | None:
        """The text of `request`, settled; a new one starts after its cached prefix. None: there is no room.

        busy: request indices whose texts stay.
        """
        text = self._texts.get(request.index)
        if text is None:
            if len(self._texts) >= self._max_texts and not self._drop_oldest(busy):
                return None
            text = self._texts[request.index] = self._after_prefix(request)
        self._texts.move_to_end(request.index)
        text.settle()
        return text

    def extend(self, text: DraftedText, num_tokens: int, busy: Container[int]) -> list[int] | None:
        """Give `text` blocks for `num_tokens` tokens: those that the ranks do not know yet; None: there is no room."""
        count = self._pools.blocks_for(num_tokens) - text.num_blocks
        while count > self._pools.num_free:
            if not self._drop_oldest(busy):
                return None
        added = self._pools.extend(text.tables, count) if count > 0 else []
        text.num_blocks += max(0, count)
        if text.is_new:
            text.is_new = False
            return [block for table in text.tables for block in table]
        return added

    def computed(self, text: DraftedText, num_cached: int) -> None:
        """The first `num_cached` known tokens are in the cache now: others may share their full blocks."""
        text.num_cached = num_cached
        full = num_cached // self._pools.block_size
        if self._pools.enable_prefix_caching and full > text.num_published:
            hashes = text.request.hashes_of_blocks(full, self._pools.block_size)
            start = text.num_published
            self._pools.publish(text.tables, text.num_blocks, start, hashes[start:full])
            text.num_published = full
        self._pools.free_out_of_window_blocks(
            text.tables, text.num_blocks, max(0, num_cached - 1), text.request.num_prompt_tokens
        )

    def forget(self, request: Request) -> None:
        """Free the blocks of a request."""
        text = self._texts.pop(request.index, None)
        if text is not None:
            self._pools.free(text.tables)
            if not text.is_new:
                self._dropped.append(request.index)

    def take_dropped(self) -> list[int]:
        """Requests whose block tables the next plan drops on every rank."""
        dropped, self._dropped = self._dropped, []
        return dropped

    def reset(self) -> None:
        """Forget all texts and cached prefixes, because the cache has lost its memory."""
        for text in list(self._texts.values()):
            self.forget(text.request)
        self._pools.reset_prefix_cache()

    def assert_idle(self) -> None:
        """Raise AssertionError unless no request holds a block."""
        assert not self._texts, f"requests {list(self._texts)} hold blocks of the draft model"
        self._pools.assert_idle()

    def _after_prefix(self, request: Request) -> DraftedText:
        size = self._pools.block_size
        num_blocks = (request.num_tokens - 1) // size if self._pools.enable_prefix_caching else 0
        count, tables = self._pools.match_prefix(request.hashes_of_blocks(num_blocks, size)[:num_blocks])
        self._pools.share(tables)
        return DraftedText(request, tables, count, count * size, num_published=count)

    def _drop_oldest(self, busy: Container[int]) -> bool:
        """Free the blocks of the text that was used least recently; False if all are busy."""
        oldest = next((text for index, text in self._texts.items() if index not in busy), None)
        if oldest is not None:
            self.forget(oldest.request)
        return oldest is not None
