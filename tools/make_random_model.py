"""Make a Llama checkpoint with random weights, for measurements: `python -m tools.make_random_model llama-0.5b FOLDER`.

Without FOLDER it is stored in the cache, where `ulysses-infer bench ... --random-model llama-0.5b` looks for it.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from ulysses_infer.bench.random_model import SHAPES, random_model
from ulysses_infer.console.library_logging import quiet_libraries
from ulysses_infer.errors import UlyssesError


def main() -> None:
    """Make the checkpoint and print its folder."""
    parser = argparse.ArgumentParser(description="Make a Llama checkpoint with random weights.")
    parser.add_argument("name", help=f"one of {', '.join(SHAPES)}")
    parser.add_argument("folder", nargs="?", type=Path, help="where to write it; default: the cache")
    arguments = parser.parse_args()
    quiet_libraries(rank=0)
    try:
        print(random_model(arguments.name, arguments.folder))
    except UlyssesError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
