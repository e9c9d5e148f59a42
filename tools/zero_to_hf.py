"""Convert a DeepSpeed training checkpoint into a Hugging Face folder.

    python -m tools.zero_to_hf runs/mine/checkpoints models/mine [--config FOLDER] [--dtype bfloat16]

The first argument is the folder given to `save_checkpoint` (its file `latest` names the step), the folder of one step,
or a universal checkpoint; ZeRO stages 0 to 3. DeepSpeed's own functions merge the parts.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path
from typing import Any

import torch

from ulysses_infer.errors import CheckpointError, UlyssesError, first_line
from ulysses_infer.model.loading.sources import Checkpoint, find_checkpoint
from ulysses_infer.model.model import DTYPES, build_empty_model, choose_dtype, read_config

COMPANIONS = (
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.jinja",
    "spiece.model",
)
"""Files next to config.json that belong to the model."""


def convert(checkpoint: Checkpoint, output: Path, dtype: str = "auto") -> Any:
    """Write the folder `output`; returns its transformers model. Raises `CheckpointError`."""
    files = checkpoint.find_files()
    config = read_config(files)
    chosen = choose_dtype(dtype, config)
    model = build_empty_model(config, chosen)
    _fill(model, checkpoint, chosen)
    model.save_pretrained(output)
    for pattern in COMPANIONS:
        for path in files.glob(pattern):
            shutil.copyfile(path, output / path.name)
    return model


def _fill(model: Any, checkpoint: Checkpoint, dtype: torch.dtype) -> None:
    """Load the checkpoint into `model`, which is on the meta device, and tie its tied weights."""
    source = checkpoint.open()
    state = {}
    for name in source.keys():  # noqa: SIM118 - a source is no mapping
        tensor = source.read(name, None)
        state[name] = tensor.to(dtype) if tensor.is_floating_point() else tensor
    try:
        _, unexpected = model.load_state_dict(state, strict=False, assign=True)
    except RuntimeError as error:  # of another shape
        raise CheckpointError(f"{checkpoint.folder} does not fit its config.json: {first_line(error)}") from error
    model.tie_weights()
    empty = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if empty or unexpected:
        wrong = (
            f"lacks {len(empty)} tensors, first {empty[0]}"
            if empty
            else f"has {unexpected[0]}, which the model does not have"
        )
        raise CheckpointError(f"{checkpoint.folder} does not fit its config.json: it {wrong}")


def main(argv: list[str]) -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="the DeepSpeed checkpoint")
    parser.add_argument("output", type=Path, help="the folder to write")
    parser.add_argument("--config", help="folder with config.json (and tokenizer), if the checkpoint has none")
    parser.add_argument("--dtype", choices=["auto", *DTYPES], default="auto", help="auto: the dtype in config.json")
    arguments = parser.parse_args(argv)
    try:
        checkpoint = find_checkpoint(arguments.checkpoint, hf_config=arguments.config)
        model = convert(checkpoint, arguments.output, arguments.dtype)
    except UlyssesError as error:
        sys.exit(f"zero_to_hf: {error}")
    print(f"{arguments.output}: {model.num_parameters():,} parameters in {model.dtype}, from {checkpoint.step}")


if __name__ == "__main__":
    main(sys.argv[1:])
