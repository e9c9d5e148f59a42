"""The demo model's training recipe: its schema, and how it is read from YAML and the command line."""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from omegaconf import OmegaConf

from benchmarks.arguments import launcher_options
from ulysses_infer.config.settings import locate


@dataclass
class CorpusConfig:
    """The corpus and its tokenizer."""

    vocab_size: int = 2048
    held_out_every: int = 40  # about one file in this many is held out for evaluation
    max_files: int | None = None  # None: the whole standard library


@dataclass
class ModelConfig:
    """Shape of the Llama model."""

    hidden_size: int = 256
    intermediate_size: int = 640
    num_hidden_layers: int = 5
    num_attention_heads: int = 8
    num_key_value_heads: int = 4
    head_dim: int = 32
    max_position_embeddings: int = 2048


@dataclass
class TrainConfig:
    """Length of the run and its optimizer."""

    steps: int = 2000
    seq_length: int = 1024
    micro_batch: int = 8  # sequences per step and sequence-parallel group
    learning_rate: float = 2.5e-3
    min_learning_rate_ratio: float = 0.05
    warmup_steps: int = 100
    weight_decay: float = 0.1
    grad_clip: float = 1.0
    seed: int = 0
    eval_batches: int = 8
    log_every: int = 10
    save_every: int = 100
    resume: bool = False


@dataclass
class ParallelConfig:
    """How the ranks share the work."""

    sequence_parallel: int | None = None  # None: all ranks work on each sequence
    zero_stage: int = 2
    dtype: str = "bf16"  # of the forward pass; master weights are always fp32


@dataclass
class Recipe:
    """The whole recipe, as recipes/train_demo.yaml spells it."""

    output_dir: str = "models/demo"
    run_dir: str = "runs/train_demo"
    corpus: CorpusConfig = field(default_factory=CorpusConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)


def load_recipe(path: str | None, overrides: list[str], recipe: type[Any] = Recipe) -> Any:
    """A `recipe`: its defaults, then the recipe file, then the command line. Exits on an unknown key.

    A model's relative path is found from the folder of the recipe that names it, its repository or the working
    directory.
    """
    if path and not Path(path).is_file():
        sys.exit(f"recipe '{path}' does not exist; give the path of a YAML file")
    schema = OmegaConf.structured(recipe)
    known = list(dotted_keys(_plain(schema)))
    layers = [(OmegaConf.load(path), Path(path).resolve().parent)] if path else []
    _find_model(schema, Path(__file__).parent)
    for layer, folder in [*layers, (OmegaConf.from_dotlist(overrides), Path.cwd())]:
        reject_unknown_keys(_plain(layer), known)
        _find_model(layer, folder)
        schema = OmegaConf.merge(schema, layer)
    return OmegaConf.to_object(schema)


def _find_model(layer: Any, folder: Path) -> None:
    """Make the path of a model absolute; a mapping is its shape."""
    if isinstance(layer.get("model"), str):
        layer.model = locate(layer.model, folder)


def _plain(tree: Any) -> Mapping[str, object]:
    """An OmegaConf mapping as plain dicts."""
    return cast(Mapping[str, object], OmegaConf.to_container(tree))


def dotted_keys(tree: Mapping[str, object], prefix: str = "") -> Iterator[str]:
    """Dotted paths of all leaves of nested mappings, as on the command line."""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from dotted_keys(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"


def reject_unknown_keys(layer: Mapping[str, object], known: list[str]) -> None:
    """Exit on an unknown key, naming the most similar known key."""
    for key in dotted_keys(layer):
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1, cutoff=0.3)
            sys.exit(f"unknown key '{key}'" + (f"; did you mean '{near[0]}'?" if near else ""))


def parse_arguments(description: str, argv: list[str], recipe: type[Any] = Recipe) -> Any:
    """Parse the command line of a training script into a `recipe`."""
    parser = argparse.ArgumentParser(description=description, parents=[launcher_options()])
    parser.add_argument("--config", help="recipe (YAML)")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    arguments = parser.parse_args(argv)
    return load_recipe(arguments.config, arguments.overrides, recipe)
