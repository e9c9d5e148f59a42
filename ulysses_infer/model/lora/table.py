"""The LoRA adapters that requests may name: loaded at start or while requests run."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass

from ulysses_infer.errors import RequestError


@dataclass
class _Loaded:
    number: int
    num_bytes: int


class ServedAdapters:
    """Rank 0's table of adapters, by name. A number in step plans is never used again for another adapter."""

    def __init__(self, names: Iterable[str], runtime_bytes: int = 0) -> None:
        """names: those loaded at start. runtime_bytes: for all that are loaded later."""
        self._loaded = {name: _Loaded(number, 0) for number, name in enumerate(names, start=1)}
        self._removed: list[_Loaded] = []
        self._next_number = len(self._loaded) + 1
        self._runtime_bytes = runtime_bytes

    @property
    def names(self) -> list[str]:
        """The names that requests may use."""
        return list(self._loaded)

    def number(self, name: str | None) -> int:
        """The number of an adapter in step plans; 0: none. Raises `RequestError` for an unknown name."""
        if name is None:
            return 0
        if name not in self._loaded:
            raise RequestError(f"adapter {name!r} is not loaded; loaded are: {', '.join(self._loaded) or 'none'}")
        return self._loaded[name].number

    def next_number(self, name: str, num_bytes: int, replace: bool = False) -> int:
        """The number that a new adapter will have.

        replace: it may replace one of the same name. Raises `RequestError` if the name is in use, or if there is no
        memory for the adapter.
        """
        if not self._runtime_bytes:
            raise RequestError("no adapter can be loaded while serving; start with lora.runtime_bytes above 0")
        if name in self._loaded and not replace:
            raise RequestError(f"an adapter {name!r} is loaded; unload it first, or replace it with load_inplace")
        left = self._runtime_bytes - sum(found.num_bytes for found in [*self._loaded.values(), *self._removed])
        if num_bytes > left:
            raise RequestError(
                f"adapter {name!r} takes {num_bytes} bytes, and {max(left, 0)} of lora.runtime_bytes = "
                f"{self._runtime_bytes} are left; unload another, or start with more"
            )
        return self._next_number

    def add(self, name: str, num_bytes: int) -> None:
        """Serve the adapter that has been loaded with `next_number`. One of the same name is removed."""
        if name in self._loaded:
            self.remove(name)
        self._loaded[name] = _Loaded(self._next_number, num_bytes)
        self._next_number += 1

    def remove(self, name: str) -> None:
        """Refuse new requests with it; those that run go on. Raises `RequestError` for an unknown name."""
        self.number(name)
        self._removed.append(self._loaded.pop(name))

    def take_unused(self, used: Collection[int]) -> list[int]:
        """Numbers of removed adapters that no request uses any more; the caller drops their weights."""
        unused = [found.number for found in self._removed if found.number not in used]
        self._removed = [found for found in self._removed if found.number in used]
        return unused
