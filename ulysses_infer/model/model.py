"""`ShiftModel`, a loaded checkpoint that runs in any mode, and `ModelBuilder`, which loads it."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from torch.overrides import TorchFunctionMode

from ulysses_infer.arithmetic import ceil_div
from ulysses_infer.attention.backend import AttentionOptions
from ulysses_infer.cache.states import StateShape
from ulysses_infer.config import ModelConfig
from ulysses_infer.errors import (
    CheckpointError,
    ConfigError,
    UnsupportedModelError,
    first_line,
    kind_and_line,
)
from ulysses_infer.model.context import StepContext, use_step_context
from ulysses_infer.model.definitions.registration import register_definitions
from ulysses_infer.model.experts import choose_placement, expert_sizes
from ulysses_infer.model.fusion.decoder import FusedDecoder
from ulysses_infer.model.fusion.fuse import Fusion
from ulysses_infer.model.hidden_states import HiddenStates
from ulysses_infer.model.injection.architectures import check_supported
from ulysses_infer.model.injection.heads import layer_heads
from ulysses_infer.model.injection.inject import Injection
from ulysses_infer.model.injection.latent_cache import enable_latent_cache
from ulysses_infer.model.injection.probe import probe
from ulysses_infer.model.layers.rotary import choose_max_model_len, freeze_rotary
from ulysses_infer.model.loading.checkpoint import Loader, Progress
from ulysses_infer.model.loading.files import MemorySource, SafetensorsSource, TensorSource
from ulysses_infer.model.loading.hf_overrides import blamed, overridden
from ulysses_infer.model.loading.legacy_configs import legacy_config
from ulysses_infer.model.loading.multimodal import auto_class, drop_multimodal_encoders, thinker_of
from ulysses_infer.model.loading.sources import unpartitioned
from ulysses_infer.model.loading.weight_tying import resolve_weight_tying
from ulysses_infer.model.quantization.cache_scales import apply_cache_scales
from ulysses_infer.model.quantization.formats import Quantization, read_quantization
from ulysses_infer.model.quantization.layers import mark_online, mark_quantised
from ulysses_infer.model.quantization.online import online_scheme
from ulysses_infer.model.recurrent.history import kept_states
from ulysses_infer.model.shape import LayerHeads, ModelShape
from ulysses_infer.parallel.layout import Layout, Mode, Span

logger = logging.getLogger(__name__)
LARGE_TENSOR_ELEMENTS = 1 << 26  # elements
STREAMS = ("altup_num_inputs", "hc_mult", "hc_count")
"""Names for the number of residual streams: of AltUp (gemma3n), and of hyper-connections."""
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


class ShiftModel:
    """The model of one rank: its slice of the weights, stored once, and views of it for every mode."""

    def __init__(self, injection: Injection, shape: ModelShape, dtype: torch.dtype) -> None:
        self.injection, self.shape, self.dtype = injection, shape, dtype
        self.module = injection.model
        self.decoder: FusedDecoder | None = None
        self.attention_options: list[AttentionOptions | None] = []
        """The attention options of each layer, recorded by the probe; None: it has no attention."""
        self._mode: Mode | None = None
        self.hf_overrides: Mapping[str, Any] = {}
        """The config values that the recipe overrides."""
        self.weights_version = 0
        """Incremented whenever weights change address. Recorded graphs of an older version are invalid."""

    @property
    def vocabulary(self) -> Span:
        """The part of the vocabulary whose logits this rank computes."""
        return self.injection.head.vocabulary

    @property
    def weight_bytes(self) -> int:
        """Bytes of the parameters stored on this rank, tied ones counted once."""
        return sum(p.numel() * p.element_size() for p in self.module.parameters())

    @property
    def skips_tokens(self) -> bool:
        """Whether its later layers run on the tokens that need logits only."""
        skips: bool = getattr(self.module, "skips_tokens", False)
        return skips

    @property
    def skipped_share(self) -> float:
        """The share of these later layers in all layers."""
        return len(self.module.config.key_value_sources) / self.shape.num_layers if self.skips_tokens else 0.0

    @property
    def state_shapes(self) -> tuple[StateShape, ...]:
        """The states of its layers on this rank; empty if it has none."""
        recurrent = [shape for layer in self.injection.recurrent_layers for shape in layer.state_shapes]
        return (*recurrent, *kept_states(self.injection.decoder))

    def rebind(self) -> None:
        """Recreate the views of the weights. Call it after weights have changed address."""
        self.injection.forget_views()
        self.injection.bind(self.injection.base)
        self._mode = self.injection.base.mode
        self.weights_version += 1

    def bind_again(self) -> None:
        """Let the next step bind all layers, of which some are new."""
        self._mode = None

    def keep_hidden(self, states: HiddenStates) -> None:
        """Keep hidden states of every step from now on."""
        if self.decoder is not None:
            self.decoder.kept = states
        else:
            states.watch(self.module.get_decoder())

    @torch.inference_mode()
    def forward(
        self, input_ids: torch.Tensor, positions: torch.Tensor, logits_rows: torch.Tensor, context: StepContext
    ) -> torch.Tensor:
        """Run one step on this rank's token slice.

        input_ids, positions: [t] int64; logits_rows: indices into the slice of the tokens that need logits. Returns
        [n, V/W]: logits of all such tokens of the batch, for this rank's part of the vocabulary.
        """
        self._bind(context)
        with use_step_context(replace(context, positions=positions, logits_rows=logits_rows)):
            if self.decoder is not None:
                return self.decoder(input_ids, positions, logits_rows)
            output = self.module(
                input_ids=input_ids[None], position_ids=positions[None], use_cache=False, logits_to_keep=logits_rows
            )
        logits: torch.Tensor = output.logits[0]
        return logits

    @torch.inference_mode()
    def hidden(self, input_ids: torch.Tensor, positions: torch.Tensor, context: StepContext) -> torch.Tensor:
        """`forward` up to what the head reads, [t, D]; only with a fused layer loop."""
        assert self.decoder is not None
        self._bind(context)
        with use_step_context(replace(context, positions=positions)):
            return self.decoder.hidden(input_ids, positions)

    @torch.inference_mode()
    def logits(self, hidden: torch.Tensor, rows: torch.Tensor, context: StepContext) -> torch.Tensor:
        """The rest of `forward`. hidden: [t, D]; rows: [n] of this rank; the head is the same in every mode."""
        assert self.decoder is not None
        with use_step_context(context):
            return self.decoder.logits(hidden, rows)

    def _bind(self, context: StepContext) -> None:
        """Let the layers read their weights as the mode of the step needs them."""
        place = context.collectives.place
        if place.mode != self._mode:
            self.injection.bind(place)
            self._mode = place.mode


def read_config(folder: Path, trust_remote_code: bool = False) -> Any:
    """The transformers config of a checkpoint folder. Raises `CheckpointError` if it cannot be read."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    register_definitions()
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder} has no config.json; give a folder that save_pretrained wrote")
    try:
        config = legacy_config(folder) or AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
        return thinker_of(config)
    except CheckpointError:
        raise
    except StrictDataclassError as error:
        raise CheckpointError(f"{folder / 'config.json'} cannot be read: {' '.join(str(error).split())}") from error
    except Exception as error:  # transformers does not check every value, and the config's class may be remote code
        raise CheckpointError(f"{folder / 'config.json'} cannot be read: {kind_and_line(error)}") from error


def choose_dtype(name: str, config: Any) -> torch.dtype:
    """The dtype to serve in. `auto`: the checkpoint's dtype, or float32 if it has none."""
    if name != "auto":
        return DTYPES[name]
    own = getattr(config.get_text_config(decoder=True), "dtype", None) or getattr(config, "dtype", None)
    return own if isinstance(own, torch.dtype) else DTYPES.get(str(own), torch.float32)


class ModelBuilder:
    """Builds the model of one rank. Its shapes and sizes are known before any weight is read or allocated."""

    def __init__(
        self,
        config: Any,
        open_source: Callable[[], TensorSource],
        settings: ModelConfig,
        layout: Layout,
        shard: int,
        device: torch.device,
        expert_placement: str = "replicate",
        memory: int | None = None,
        latent: bool | None = None,
    ) -> None:
        """`memory`: bytes available on the rank with the least memory, for `expert_placement` auto; None: unlimited.
        `latent`: the recipe's `cache.latent`."""
        config = overridden(config, settings.hf_overrides)
        check_supported(config, settings.allow_unverified)
        self.dtype, self.device = choose_dtype(settings.dtype, config), device
        empty = build_empty_model(config, self.dtype, settings.trust_remote_code)
        drop_multimodal_encoders(empty)
        resolve_weight_tying(empty, open_source)
        self._full_shapes = {
            name: tuple(parameter.shape) for name, parameter in empty.named_parameters(remove_duplicate=False)
        }
        quantization = read_quantization(config, lambda: open_source().keys())
        if quantization is not None:
            mark_quantised(empty, quantization)
        if settings.quantize is not None:
            _check_dense(settings.quantize, quantization)
            head_scheme = online_scheme("int8", 0) if settings.quantize_head else None
            mark_online(empty, online_scheme(settings.quantize, settings.quantize_group_size), head_scheme)
        placement = choose_placement(expert_placement, layout, expert_sizes(empty), memory)
        self.injection = Injection(empty, layout, shard, placement)
        enable_latent_cache(self.injection, latent)
        self.shape = model_shape(self.injection, settings.max_model_len)
        self.open_source, self._overrides = open_source, settings.hf_overrides
        for cost in self.shape.costs_of_padding(layout) if shard == 0 else ():
            logger.warning("%s", cost)

    @classmethod
    def from_folder(
        cls,
        folder: Path,
        settings: ModelConfig,
        layout: Layout,
        shard: int,
        device: torch.device,
        open_source: Callable[[], TensorSource] | None = None,
        **options: Any,
    ) -> ModelBuilder:
        """Build `shard` of the checkpoint in `folder`; `options`: `expert_placement`, `memory`, `latent`.

        `open_source` opens the weights if they are not safetensors files in `folder`.
        """
        config = read_config(folder, settings.trust_remote_code)
        source = open_source or (lambda: SafetensorsSource(folder))
        return cls(config, source, settings, layout, shard, device, **options)

    @classmethod
    def from_pretrained(
        cls,
        model: Any,
        settings: ModelConfig,
        layout: Layout,
        shard: int,
        device: torch.device,
        open_source: Callable[[], TensorSource] | None = None,
        **options: Any,
    ) -> ModelBuilder:
        """Build `shard` of a `transformers.PreTrainedModel` in memory, which is not modified.

        `open_source` opens the weights if they are not in its state dict.
        """
        config = thinker_of(copy.deepcopy(model.config))
        config.dtype = model.dtype
        source = open_source or (lambda: MemorySource(model.state_dict()))
        return cls(config, source, settings, layout, shard, device, **options)

    @property
    def weight_bytes(self) -> int:
        """Bytes of the parameters that this rank will store."""
        return sum(p.numel() * p.element_size() for p in self.injection.model.parameters())

    @property
    def expert_bytes(self) -> int:
        """Bytes of the experts among them, which are never shared between ranks."""
        modules = (layer.weights.module for layer in self.injection.expert_layers)
        return sum(p.numel() * p.element_size() for module in modules for p in module.parameters())

    def load_cache_scales(self) -> None:
        """Load the checkpoint's scales for an FP8 KV cache. Raises `CheckpointError` if they are invalid."""
        apply_cache_scales(self.injection, self.open_source())

    def loader(self, source: TensorSource, kind: type[Loader] = Loader) -> Loader:
        """The loader that fills this rank's parameters from `source`."""
        return kind(self.injection, source, self._full_shapes, self.dtype, self.device)

    def load(self, progress: Progress | None = None, fuse: bool = True) -> ShiftModel:
        """Load the weights; `fuse`: replace modules by equivalent fused ones. Raises `CheckpointError`."""
        with blamed(self._overrides):
            self.loader(self.open_source()).load(progress)
        self.injection.model.to(self.device)
        freeze_rotary(self.injection.model, self.shape.max_model_len)
        model = ShiftModel(self.injection, self.shape, self.dtype)
        model.hf_overrides = self._overrides
        probe(model)
        if fuse:
            Fusion(model)
        for layer in self.injection.expert_layers:  # the probe and the fusion tests are not traffic
            layer.forget_counts()
        return model


def _check_dense(wanted: str, quantization: Quantization | None) -> None:
    if quantization is not None:
        raise ConfigError(
            f"model.quantize = {wanted!r}: the checkpoint is quantised already, by {quantization.method}; leave the "
            "key out, or give a checkpoint in bfloat16"
        )


class _EmptyWeights(TorchFunctionMode):
    """Creates large tensors on the meta device, and draws no numbers for tensors that are there.

    Otherwise accelerate first allocates llama4's experts, 2.5 GiB per layer, and then discards them; no buffer is this
    large. Drawing on the meta device takes milliseconds per tensor and has no effect.
    """

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function in (torch.Tensor.normal_, torch.Tensor.uniform_) and args[0].is_meta:
            return args[0]
        if function in (torch.zeros, torch.empty) and "device" not in kwargs:
            size = args[0] if args and isinstance(args[0], Sequence) else args
            if all(isinstance(n, int) for n in size) and math.prod(size) >= LARGE_TENSOR_ELEMENTS:
                kwargs = {**kwargs, "device": "meta"}
        return function(*args, **kwargs)


def build_empty_model(config: Any, dtype: torch.dtype, trust_remote_code: bool = False) -> Any:
    """The transformers model of `config`, with its parameters on the meta device and its buffers allocated."""
    from accelerate import init_empty_weights

    try:
        with unpartitioned(), init_empty_weights(include_buffers=False), _EmptyWeights():
            model = auto_class(config).from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
    except (ValueError, ImportError) as error:
        reason = first_line(error)
        raise UnsupportedModelError(
            f"model type {config.model_type!r} has no causal language model: {reason}"
        ) from error
    except Exception as error:  # sizes or names that no layer can have
        raise CheckpointError(f"config.json describes no model that can be built: {kind_and_line(error)}") from error
    return model.eval()


def model_shape(injection: Injection, max_model_len: int | None) -> ModelShape:
    """Sizes of the injected model.

    Raises `ConfigError` if `max_model_len` exceeds its table of learned positions.
    """
    config = injection.config
    layers: list[LayerHeads | None] = [None] * config.num_hidden_layers
    for module in injection.attention_layers:
        layer: Any = module
        if layer.layer_idx < len(layers):  # beyond are layers that the forward does not run (drafts)
            layers[layer.layer_idx] = layer_heads(layer, config)
    return ModelShape(
        layers=tuple(layers),
        hidden_size=config.hidden_size,
        residual_width=config.hidden_size * math.prod(getattr(config, name, 1) for name in STREAMS),
        intermediate_size=max(_intermediate_size(config), _relative_logits(config, injection.layout.world_size)),
        vocab_size=injection.head_vocab_size,
        # Only one rank warns.
        max_model_len=choose_max_model_len(config, max_model_len, warn=injection.base.shard == 0),
        entries=tuple(entry for module in injection.attention_layers for entry in cast(Any, module).head_plan.entries),
    )


def _relative_logits(config: Any, world_size: int) -> int:
    """Logits of relative positions per token that a layer of a rank adds to scores (inkling)."""
    extent = getattr(config, "rel_extent", 0)
    return int(extent * ceil_div(config.num_attention_heads, world_size)) if extent else 0


def _intermediate_size(config: Any) -> int:
    """The width of the widest feed-forward block, and of the inputs that every layer gets besides (gemma3n, gemma4)."""
    size = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    widest = max(size) if isinstance(size, Sequence) else size  # one per layer (gemma3n)
    per_layer = config.num_hidden_layers * (getattr(config, "hidden_size_per_layer_input", None) or 0)
    return int(widest * (2 if getattr(config, "use_double_wide_mlp", False) else 1)) + per_layer
