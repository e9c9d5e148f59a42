"""docs/models.md from the results of the sweep."""
from __future__ import annotations
from pathlib import Path
from typing import Any

def write_page(results: dict[str, dict[str, Any]], page: Path) -> int:
    return 0
