"""Free numbers of blocks or slots; takes memory for those that were ever taken, however many there are."""

from __future__ import annotations

from collections.abc import Iterable


class FreeList:
    """The free ones of the numbers 0 to `count` - 1: those given back last are taken first, then unused ones from 0."""

    def __init__(self, count: int) -> None:
        self._count, self._first_unused = count, 0
        self._returned: list[int] = []

    def __len__(self) -> int:
        return self._count - self._first_unused + len(self._returned)

    def take(self, most: int) -> list[int]:
        """`most` free numbers, or all if they are fewer."""
        kept = max(0, len(self._returned) - most)
        found = self._returned[kept:][::-1]
        del self._returned[kept:]
        end = min(self._count, self._first_unused + most - len(found))
        found += range(self._first_unused, end)
        self._first_unused = end
        return found

    def give(self, number: int) -> None:
        """Give a number back."""
        self._returned.append(number)

    def give_all(self, numbers: Iterable[int]) -> None:
        """Give numbers back, the last of which is the first to be taken."""
        self._returned.extend(numbers)
