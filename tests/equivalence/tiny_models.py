"""Tiny random checkpoints and transformers' own outputs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

VOCABULARY = 101  # a prime: vocabulary shards are uneven on any number of ranks
PROMPT_LENGTHS = (1, 2, 7, 13, 21, 38)
NEW_TOKENS = 9
INEXACT_CACHES = ("nemotron_h", "nemotron_h_omni")
"""With a cache, transformers does not limit their time steps, as it does in a forward over the whole text."""


@dataclass(frozen=True)
class Reference:
    """A checkpoint and, for each prompt, transformers' greedy tokens and the log-probability of every token after
    the first of prompt + completion."""

    folder: Path
    prompts: list[list[int]]
    tokens: list[list[int]]
    logprobs: list[list[float]]


def perturb(model: torch.nn.Module, seed: int = 0) -> None:
    """Random values for every parameter: constants (norm weights, biases) get noise, the rest a useful scale.

    transformers' own initialisation leaves norms at 1, biases at 0 and attention nearly flat, where a shard of the
    wrong heads would not show.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters()):
            noise = torch.randn(parameter.shape, generator=generator)
            constant = parameter.numel() > 1 and bool((parameter == parameter.flatten()[0]).all())
            if parameter.dim() < 2 or constant:
                parameter.add_(noise, alpha=0.3)
            else:
                parameter.copy_(noise * 1.2 * parameter.shape[-1] ** -0.5)


def make_checkpoint(config: Any, folder: Path, seed: int = 0) -> Any:
    """Save a tiny random model of `config` to `folder` and return transformers' own model of it, in float32."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.manual_seed(seed)
    kind = model_class(config)
    model = kind.from_config(config, dtype=torch.float32)
    perturb(model, seed)
    model.save_pretrained(folder)
    return kind.from_pretrained(folder, dtype=torch.float32).eval()


def model_class(config: Any) -> Any:
    """The class whose checkpoints have `config`: with vision and audio encoders where it has them."""
    from transformers import MODEL_FOR_MULTIMODAL_LM_MAPPING, AutoModelForCausalLM, AutoModelForMultimodalLM

    return AutoModelForMultimodalLM if type(config) in MODEL_FOR_MULTIMODAL_LM_MAPPING else AutoModelForCausalLM


def make_prompts(vocabulary: int = VOCABULARY, lengths: tuple[int, ...] = PROMPT_LENGTHS) -> list[list[int]]:
    """Random token ids, ids below 3 (often padding and the like) left out."""
    generator = torch.Generator().manual_seed(len(lengths))
    return [torch.randint(3, vocabulary, (length,), generator=generator).tolist() for length in lengths]


@torch.inference_mode()
def make_reference(
    model: Any, folder: Path, prompts: list[list[int]], new_tokens: int = NEW_TOKENS, first_position: int = 0
) -> Reference:
    """Greedy completions by `generate` and teacher-forced log-probabilities by one plain forward per prompt.

    first_position: where a plain forward counts positions from; `generate` is not told so by itself.
    """
    tokens, logprobs = [], []
    model.generation_config.eos_token_id = None
    for prompt in prompts:
        inputs = torch.tensor([prompt])
        whole = model.generate(
            input_ids=inputs,
            attention_mask=torch.ones_like(inputs),
            max_new_tokens=new_tokens,
            do_sample=False,
            pad_token_id=0,
            use_cache=model.config.model_type not in INEXACT_CACHES,
            **_positions(first_position, len(prompt)),
        )
        tokens.append(whole[0, len(prompt) :].tolist())
        logprobs.append(token_logprobs(model, whole, **_positions(first_position, whole.shape[1])))
    return Reference(folder, prompts, tokens, logprobs)


@torch.inference_mode()
def token_logprobs(model: Any, token_ids: torch.Tensor, **inputs: torch.Tensor) -> list[float]:
    """token_ids: [1, n]; the log-probability of each token but the first, given those before it."""
    scores = model(token_ids, use_cache=False, **inputs).logits[0].float().log_softmax(dim=-1)
    result: list[float] = scores[:-1].gather(1, token_ids[0, 1:, None])[:, 0].tolist()
    return result


def _positions(first: int, count: int) -> dict[str, torch.Tensor]:
    """The argument that tells a model its positions; none if it counts from 0, as all do by default."""
    return {"position_ids": torch.arange(first, first + count)[None]} if first else {}
