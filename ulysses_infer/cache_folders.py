"""Folders for files cached between runs: profiles, random models, compiled libraries."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder(kind: str) -> Path:
    """The folder for one kind of file in the user's cache (`$XDG_CACHE_HOME`, else ~/.cache); it may not exist yet."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "ulysses_infer" / kind
