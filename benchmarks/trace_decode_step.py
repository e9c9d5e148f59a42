"""Files and classes that one decode step uses, in order: `python -m benchmarks.trace_decode_step [--eager]`.

Runs the bundled model on one CPU rank, warms up, and records one decode step of `InferenceEngine.stream` with
`sys.setprofile`. Counts the package's files whose functions are called and its classes whose methods are called. Uses
only the public interface, so that it also runs on older checkouts (add them to PYTHONPATH).
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from types import FrameType
from typing import Any

import ulysses_infer
from ulysses_infer import SamplingParams

ROOT = Path(ulysses_infer.__file__).parent
MODEL = Path(__file__).parents[1] / "models" / "demo"
WARM_UP_TOKENS = 8


class Trace:
    """Collects the files and classes of the calls made while it is active."""

    def __init__(self) -> None:
        self.files: dict[str, list[str]] = {}
        self.types: dict[str, None] = {}

    def __call__(self, frame: FrameType, event: str, _: Any) -> None:
        """The callback of `sys.setprofile`."""
        path = Path(frame.f_code.co_filename)
        if event != "call" or not path.is_relative_to(ROOT):
            return
        functions = self.files.setdefault(str(path.relative_to(ROOT)), [])
        if frame.f_code.co_qualname not in functions:
            functions.append(frame.f_code.co_qualname)
        owner = type(frame.f_locals["self"]) if "self" in frame.f_locals else None
        if owner is not None and owner.__module__.startswith("ulysses_infer"):
            self.types.setdefault(owner.__qualname__)


def trace_step(eager: bool) -> Trace:
    """The trace of one decode step."""
    trace = Trace()
    overrides = {"runtime.device": "cpu", "runtime.enforce_eager": True if eager else None}
    with ulysses_infer.init_inference(str(MODEL), **overrides) as engine:
        stream = engine.stream("def main():", SamplingParams(temperature=0, max_tokens=64, ignore_eos=True))
        for _ in range(WARM_UP_TOKENS):
            next(stream)
        sys.setprofile(trace)
        next(stream)
        sys.setprofile(None)
    return trace


def main() -> None:
    """Print files in the order of their first call, with the functions called in each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--eager", action="store_true", help="run the step layer by layer instead of as a CPU graph")
    parser.add_argument("--functions", action="store_true", help="also print the functions of each file")
    options = parser.parse_args()
    trace = trace_step(options.eager)
    for number, (name, functions) in enumerate(trace.files.items(), 1):
        print(f"{number:3} {name}" + (f": {', '.join(functions)}" if options.functions else ""))
    print(f"{len(trace.files)} files, {len(trace.types)} classes: {', '.join(trace.types)}")


if __name__ == "__main__":
    main()
