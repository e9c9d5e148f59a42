"""Prints which models' decode steps are replayed from CPU graphs, and why those of the others are not.

Each model is tiny, random and in float32, on one rank. Run from the repository root:
`python -m docs.generate.recorded_decodes` for all model types, or with the names of some. The exit status is 1 if
tokens differ from transformers'.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from docs.generate.sweep_architectures import LENGTHS, every_type, prepare
from ulysses_infer import SamplingParams, init_inference
from ulysses_infer.errors import UlyssesError, UnsupportedModelError
from ulysses_infer.model.injection.architectures import REFUSED

NEW_TOKENS = 6  # as many as `prepare` asks transformers for
SETTINGS: dict[str, Any] = {
    "model.allow_unverified": True,
    "model.max_model_len": 64,
    "cache.num_blocks": 64,
    "cache.block_size": 16,
    "scheduler.max_num_seqs": len(LENGTHS),
}
NO_RUNNER = "its attention is not the C kernel's"


def main() -> int:
    """Run the models, print a line for each, and the number of those that are recorded."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="model types; default: all that are served")
    names = parser.parse_args().names or [name for name in every_type() if name not in REFUSED]
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    recorded, failed = 0, False
    for name in names:
        result = run_one(name)
        recorded += result == "recorded"
        failed |= result.startswith("wrong")
        print(f"{name:28} {result}", flush=True)
    print(f"{recorded} of {len(names)} are recorded")
    return int(failed)


def run_one(name: str) -> str:
    """`recorded`, or why not."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            expected = prepare(name, Path(folder))
        except Exception as error:  # whatever transformers cannot make or run in this form
            return f"untested: {type(error).__name__}"
        try:
            return outcome(Path(folder), expected.prompts, expected.tokens)
        except UnsupportedModelError as error:
            return f"refused: {error}"
        except UlyssesError as error:
            return f"not run: {error}"


def outcome(folder: Path, prompts: list[list[int]], tokens: list[list[int]], **changes: Any) -> str:
    """`recorded`, or why not, of decodes of `prompts`, which are to give `tokens`."""
    greedy = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True)
    with init_inference(str(folder), **{**SETTINGS, **changes}) as engine:
        outputs = [output.outputs[0].token_ids for _ in range(2) for output in engine.generate(prompts, greedy)]
        rank: Any = engine._rank
        graphs = rank.worker.graphs
        if outputs != 2 * tokens:
            return "wrong tokens"
        if graphs is None:
            return NO_RUNNER
        return "recorded" if graphs.num_recorded else "; ".join(graphs.refusals)


if __name__ == "__main__":
    sys.exit(main())
