"""A user's cache of one test alone."""

from __future__ import annotations

from pathlib import Path

from ulysses_infer.cache_folders import cache_folder


def empty_cache(folder: Path) -> str:
    """A value of XDG_CACHE_HOME: `folder`, in which nothing is cached but the compiled libraries of all tests."""
    compiled = cache_folder("native")
    compiled.mkdir(parents=True, exist_ok=True)
    own = folder / "ulysses_infer"
    own.mkdir(parents=True, exist_ok=True)
    (own / "native").symlink_to(compiled)
    return str(folder)
