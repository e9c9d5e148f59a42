"""Makes the prompt reader of a loaded model: its tokenizer, the tokens that end a text and the sampling defaults."""

from __future__ import annotations

from typing import Any

from ulysses_infer.config import Config
from ulysses_infer.model.loading.generation_config import eos_token_ids, load_generation_config, sampling_defaults
from ulysses_infer.model.loading.sources import GivenModel
from ulysses_infer.text.prompts import PromptReader
from ulysses_infer.worker.rank import Rank


def make_prompt_reader(config: Config, rank: Rank, tokenizer: Any, model: GivenModel | None = None) -> PromptReader:
    """The prompt reader of the loaded model. model: the one given in memory, if any.

    Raises `CheckpointError`, `ConfigError`.
    """
    loaded = rank.worker.model
    generation = load_generation_config(rank.folder, None if model is None else model.module)
    eos = eos_token_ids(generation, rank.folder, loaded.injection.config, tokenizer)
    defaults = sampling_defaults(config.model, generation)
    return PromptReader(tokenizer, loaded.shape.vocab_size, eos, config.model.seed, defaults)
