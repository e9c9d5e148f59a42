"""Runs every language model of the installed transformers in the engine and writes the results to docs/models.md.

Multimodal models are saved whole and compared on text. The expert placement of each layout is drawn at random, seeded
by the model type.

Run from the repository root: `python -m docs.generate.sweep_architectures --all` (an hour on two cores). Results are
kept in the page, which is written after each model type: `--only llama,opt` runs these model types again, and
`--changed` those whose results contradict `VERIFIED` or `REFUSED`. The exit status is 1 if some still do.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from transformers import CONFIG_MAPPING, AutoConfig

from docs.generate.models_page import changed, differences, read_page, write_page
from docs.generate.tiny_configs import tiny_configs
from tests.equivalence.cases import CROWD, check, run_case, with_snapshots
from tests.equivalence.tiny_models import Reference, make_checkpoint, make_prompts, make_reference
from tests.ranks import RankPools
from ulysses_infer.errors import UnsupportedModelError
from ulysses_infer.model.experts.placement import PLACEMENTS
from ulysses_infer.model.injection.architectures import REFUSED

BASES = ((1, 1), (2, 1), (1, 2), (4, 1), (2, 2))
LENGTHS = (1, 3, 9, 17, 26)
NEW_TOKENS = 6
PROFILE = replace(CROWD, settings={"model.allow_unverified": True, "model.max_model_len": 64})
SECONDS = 240.0
PAGE = Path("docs/models.md")


def main() -> int:
    """Run the sweep, write the page and compare with the lists of architectures."""
    arguments = _arguments()
    results = read_page(arguments.page) if arguments.page.is_file() else {}
    pools, bases = RankPools(), ", ".join(f"sp{sp}xtp{tp}" for sp, tp in BASES)
    try:
        for model_type in _to_run(arguments, results):
            found = results[model_type] = sweep_one(model_type, pools)
            print(f"{model_type:28} {found['outcome']:10} {found['detail']}", found.get("notes", ""), flush=True)
            write_page(results, arguments.page, bases)
    finally:
        pools.close()
    write_page(results, arguments.page, bases)
    problems = differences(results)
    print("\n".join(problems))
    return 1 if problems else 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--page", type=Path, default=PAGE, help="the page, with the results so far")
    parser.add_argument("--only", default="", help="model types to run again, comma-separated")
    parser.add_argument("--changed", action="store_true", help="run those whose results contradict the lists")
    parser.add_argument("--all", action="store_true", help="run all model types again")
    return parser.parse_args()


def _to_run(arguments: argparse.Namespace, results: dict[str, Any]) -> list[str]:
    names = every_type()
    if arguments.all:
        return names
    chosen = {name for name in names if name not in results} | set(filter(None, arguments.only.split(",")))
    return sorted(chosen | (changed(results) if arguments.changed else set()))


def every_type() -> list[str]:
    """Model types that have a causal or multimodal language model class in transformers."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as TEXT
    from transformers.models.auto.modeling_auto import MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES as MULTIMODAL

    return sorted({*TEXT, *MULTIMODAL})


def sweep_one(model_type: str, pools: RankPools) -> dict[str, Any]:
    """The outcome for one model type (yes, refused, wrong, error or untested), with a line of detail."""
    if model_type in REFUSED:
        return {"outcome": "refused", "detail": REFUSED[model_type]}
    with tempfile.TemporaryDirectory() as folder:
        reference = _attempt("untested", lambda: pools(1).run(prepare, model_type, Path(folder), timeout=SECONDS)[0])
        if isinstance(reference, dict):
            return reference
        errors, draw = [], random.Random(model_type)
        for base in BASES:
            run = partial(_run_base, base, draw.choice(PLACEMENTS), reference, pools)
            error = _attempt("error", run)
            if isinstance(error, dict):
                return error
            errors.append(error)
    return {"outcome": "yes", "detail": f"{max(errors):.1e}"}


def _attempt(failure: str, action: Callable[[], Any]) -> Any:
    """The result of `action`, or the outcome that its exception means."""
    try:
        return action()
    except UnsupportedModelError as error:
        return {"outcome": "refused", "detail": str(error)}
    except Exception as error:  # any exception of a model is a result of the sweep
        if failure == "error" and isinstance(error, AssertionError):
            return {"outcome": "wrong", "detail": _line(error)}
        return {"outcome": failure, "detail": f"{type(error).__name__}: {_line(error)}", "notes": _notes(error)}


def _run_base(base: tuple[int, int], placement: str, reference: Reference, pools: RankPools) -> float:
    pool = pools(base[0] * base[1])
    profile = replace(PROFILE, settings={**PROFILE.settings, "parallel.expert_placement": placement})
    profile = with_snapshots(profile, reference.folder)
    outcomes = pool.run(run_case, reference.folder, base, profile, reference.prompts, NEW_TOKENS, timeout=SECONDS)
    modes = [sp for sp in range(1, base[0] + 1) if base[0] % sp == 0]
    try:
        return check(outcomes, reference, profile, len(modes))
    except AssertionError as error:
        raise AssertionError(f"sp{base[0]}xtp{base[1]}, experts {placement}: {_line(error)}") from error


def prepare(model_type: str, folder: Path) -> Reference:
    """Write a checkpoint and transformers' reference results, for the first config that works; runs in a subprocess."""
    if hasattr(CONFIG_MAPPING[model_type], "thinker_config"):
        return _as_pipeline(model_type, prepare(f"{model_type}_thinker", folder))
    configs = list(tiny_configs(model_type))
    for number, config in enumerate(configs):
        try:
            model = make_checkpoint(config, folder)
            vocabulary = config.get_text_config(decoder=True).vocab_size
            first = first_position(model)
            return make_reference(model, folder, make_prompts(vocabulary, LENGTHS), NEW_TOKENS, first)
        except Exception:
            if number == len(configs) - 1:
                raise
    raise ValueError(f"no tiny config for {model_type}")


def _as_pipeline(model_type: str, reference: Reference) -> Reference:
    """Turn the checkpoint of a thinker into that of the whole pipeline."""
    weights = reference.folder / "model.safetensors"
    save_file({f"thinker.{name}": tensor for name, tensor in load_file(weights).items()}, weights)
    thinker = AutoConfig.from_pretrained(reference.folder)
    kind: Any = CONFIG_MAPPING[model_type]
    kind(thinker_config=thinker.to_dict()).save_pretrained(reference.folder)
    return reference


def first_position(model: Any) -> int:
    """The position of the first token: RoBERTa's descendants count from behind their padding token."""
    tables = [module for module in model.modules() if hasattr(module, "position_embeddings")]
    return next((module.padding_idx + 1 for module in tables if hasattr(module, "padding_idx")), 0)


def _line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def _notes(error: BaseException) -> str:
    return "\n".join(getattr(error, "__notes__", []))[-1500:]


if __name__ == "__main__":
    sys.exit(main())
