"""Makes the prompt reader of a loaded model: its tokenizer and the tokens that end a text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ulysses_infer.config import Config
from ulysses_infer.model.loading.sources import GivenModel
from ulysses_infer.text.prompts import PromptReader
from ulysses_infer.worker.rank import Rank


def make_prompt_reader(config: Config, rank: Rank, tokenizer: Any, model: GivenModel | None = None) -> PromptReader:
    """The prompt reader of the loaded model. model: the one given in memory, if any."""
    loaded = rank.worker.model
    eos = eos_token_ids(rank.folder, None if model is None else model.module, loaded.injection.config, tokenizer)
    return PromptReader(tokenizer, loaded.shape.vocab_size, eos, config.model.seed)


def eos_token_ids(folder: Path | None, model: Any, config: Any, tokenizer: Any) -> frozenset[int]:
    """Tokens that end a text: the generation config's, else the model config's, else the tokenizer's."""
    generation = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    if folder is not None and (folder / "generation_config.json").is_file():
        generation = json.loads((folder / "generation_config.json").read_text()).get("eos_token_id")
    for ids in (generation, getattr(config, "eos_token_id", None), getattr(tokenizer, "eos_token_id", None)):
        if ids is not None:
            return frozenset(ids if isinstance(ids, list) else [ids])
    return frozenset()
