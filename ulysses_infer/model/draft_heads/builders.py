"""Finds the head that a recipe asks for, and refuses those that do not fit the served model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from ulysses_infer.config import ModelConfig
from ulysses_infer.errors import ConfigError
from ulysses_infer.model.draft_heads.eagle3 import DRAFT_TO_TARGET, Eagle3Config, Eagle3Module, parameter_of
from ulysses_infer.model.draft_heads.head import HeadBuilder, HeadInjection
from ulysses_infer.model.draft_heads.module import HeadModule
from ulysses_infer.model.draft_heads.mtp import MtpModule, config_of_module
from ulysses_infer.model.draft_heads.names import FAMILIES, HeadNames, RenamedSource
from ulysses_infer.model.injection.inject import Injection
from ulysses_infer.model.injection.latent_cache import enable_latent_cache
from ulysses_infer.model.loading.files import MemorySource, SafetensorsSource, TensorSource, weights_file
from ulysses_infer.model.model import ShiftModel
from ulysses_infer.model.quantization.formats import Quantization, read_quantization
from ulysses_infer.model.quantization.layers import mark_online, mark_quantised
from ulysses_infer.model.quantization.online import online_scheme

PLAIN = (".weight", "bias")
"""Ends of the names of tensors that are not quantised."""
TORCH_FILE = "pytorch_model.bin"


def mtp_builder(served: ShiftModel, settings: ModelConfig, source: TensorSource, latent: bool | None) -> HeadBuilder:
    """The multi-token-prediction module of the served checkpoint. Raises `ConfigError` if it has none.

    source: of the served checkpoint; latent: the recipe's `cache.latent`.
    """
    config = served.injection.config
    names = FAMILIES.get(config.model_type)
    keys = _keys_of(source, names, config.num_hidden_layers) if names is not None else {}
    if names is None or not keys:
        name = settings.path or "the given model"
        raise ConfigError(
            f"speculation.method = 'mtp': {name} (model type {config.model_type!r}) has no multi-token-prediction "
            "module; use another method, or a checkpoint that has one (DeepSeek-V3, GLM-4.5, Qwen3-Next, MiMo)"
        )
    base = served.injection
    module = MtpModule(config_of_module(config), base.model, names, base.head)
    full_shapes = _as_dtype(module, served.dtype)
    quantization = read_quantization(config, source.keys)
    if quantization is not None and not all(name.endswith(PLAIN) for name in keys):
        mark_quantised(module, _renamed(quantization, names, config.num_hidden_layers))
    if settings.quantize is not None:
        mark_online(module, online_scheme(settings.quantize, settings.quantize_group_size))
    injection = HeadInjection(module, base.layout, base.base.shard, base.expert_placement, base.head)
    enable_latent_cache(injection, latent)
    return HeadBuilder(injection, full_shapes, RenamedSource(source, keys), served)


def eagle3_builder(served: ShiftModel, folder: Path) -> HeadBuilder:
    """The EAGLE-3 head in `folder`. Raises `ConfigError` if it belongs to another model."""
    config, target = Eagle3Config(folder), served.injection.config
    for what, own, wanted in (
        ("hidden size", config.target_hidden_size, target.hidden_size),
        ("vocabulary size", config.vocab_size, served.shape.vocab_size),
    ):
        if own != wanted:
            raise ConfigError(
                f"speculation.model {str(folder)!r} was trained for a model with {what} {own}, but the served model's "
                f"is {wanted}; give the head of this model"
            )
    source = _open(folder)
    keys = {name: key for key in [*source.keys()] if (name := parameter_of(key)) is not None}
    layers = config.read_layers(target.num_hidden_layers)
    _check_layers(folder, layers, target.num_hidden_layers)
    # Published configs have the length of the texts that the head was trained on, which drafts for longer ones too.
    config.layer.max_position_embeddings = max(config.layer.max_position_embeddings, served.shape.max_model_len)
    embedding = served.injection.model.get_input_embeddings()
    module = Eagle3Module(config, len(layers), embedding, "embed_tokens.weight" in keys)
    if DRAFT_TO_TARGET not in keys:
        _drop_map(folder, module, config)
    full_shapes = _as_dtype(module, served.dtype)
    config.layer._attn_implementation = target._attn_implementation
    injection = Injection(module, served.injection.layout, served.injection.base.shard)
    return HeadBuilder(injection, full_shapes, RenamedSource(source, keys), served, layers)


def _check_layers(folder: Path, layers: tuple[int, ...], num_layers: int) -> None:
    if any(not 0 <= layer < num_layers for layer in layers):
        raise ConfigError(
            f"speculation.model {str(folder)!r} reads hidden states before the layers {', '.join(map(str, layers))}, "
            f"but the served model has {num_layers} layers; give the head of this model"
        )


def _drop_map(folder: Path, module: Eagle3Module, config: Eagle3Config) -> None:
    """Without a map between vocabularies, both must be the same."""
    if config.draft_vocab_size != config.vocab_size:
        raise ConfigError(
            f"speculation.model {str(folder)!r} has a vocabulary of {config.draft_vocab_size} of {config.vocab_size} "
            f"tokens, but no tensor {DRAFT_TO_TARGET!r} that says which; download it again"
        )
    setattr(module, DRAFT_TO_TARGET, torch.zeros(config.draft_vocab_size, dtype=torch.int64))
    module._non_persistent_buffers_set.add(DRAFT_TO_TARGET)


def _keys_of(source: TensorSource, names: HeadNames, num_layers: int) -> dict[str, str]:
    """The checkpoint's key of each parameter of its multi-token-prediction module."""
    found = ((names.parameter_of(key, num_layers), key) for key in [*source.keys()])
    return {name: key for name, key in found if name is not None}


def _as_dtype(module: HeadModule, dtype: torch.dtype) -> dict[str, tuple[int, ...]]:
    """Give the parameters, on device `meta`, the type that they are served in; returns their shapes."""
    for parameter in module.parameters():
        parameter.requires_grad_(False)
        parameter.data = parameter.data.to(dtype)
    return {name: tuple(parameter.shape) for name, parameter in module.named_parameters()}


def _renamed(quantization: Quantization, names: HeadNames, num_layers: int) -> Quantization:
    """`quantization` for the names of the module's parts, instead of the checkpoint's."""

    def by_original(selected: Callable[[str], bool]) -> Callable[[str], bool]:
        return lambda name: selected(names.original_of(name, num_layers))

    groups = tuple((by_original(selected), scheme) for selected, scheme in quantization.groups)
    return replace(quantization, groups=groups, ignored=by_original(quantization.ignored))


def _open(folder: Path) -> TensorSource:
    """The tensors of a head; some are published in torch's format."""
    if weights_file(folder) is None and (folder / TORCH_FILE).is_file():
        return MemorySource(torch.load(folder / TORCH_FILE, map_location="cpu", weights_only=True, mmap=True))
    return SafetensorsSource(folder)
