"""Selects the attention backend that a model, its cache and its device can use."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, replace

import torch

from ulysses_infer.attention.backend import AttentionBackend, AttentionOptions
from ulysses_infer.attention.flashinfer_latent import WIDTHS as LATENT_WIDTHS
from ulysses_infer.attention.native import NativeAttention
from ulysses_infer.attention.torch_loop import TorchLoopAttention
from ulysses_infer.errors import ConfigError
from ulysses_infer.native.library import NativeUnavailableError, is_available

logger = logging.getLogger(__name__)

HALF = (torch.float16, torch.bfloat16)
FLASH_PAGE = 256  # FlashAttention-2 needs a page size that is a multiple of this
FLASH_WIDTH = 256
FLASHINFER_WIDTHS = (64, 128, 256)
TRITON_WIDTHS = (576, 512)  # of keys and values; tiles of wider ones do not fit shared memory
FUNCTIONS = {
    "flash_attn": ("flash_attn", "flash_attn_varlen_func"),
    "flashinfer": ("flashinfer", "BatchPrefillWithPagedKVCacheWrapper"),
    "triton": ("triton", "jit"),
}
"""The module that each backend needs, and what is called of it."""


@dataclass(frozen=True)
class AttentionNeeds:
    """What a model, its cache and its GPU require of an attention backend."""

    capability: tuple[int, int]
    """Compute capability of the GPU: (8, 0) is Ampere, (9, 0) Hopper."""
    dtype: torch.dtype
    cache_dtype: torch.dtype
    key_width: int
    value_width: int
    block_size: int
    chunks: bool = False
    latents: bool = False
    """Whether the cache holds latents (MLA), whose first elements are the values."""
    alibi: bool = False
    """Whether scores fall with distance, by a slope per head (ALiBi)."""
    relative: bool = False
    """Whether each query adds logits of its own by distance."""
    selects: bool = False
    """Whether an index on the device selects the keys of each token, which a plan on the host cannot know."""
    other_widths: frozenset[tuple[int, int]] = frozenset()
    """Widths of keys and values of other layers, where layers differ."""

    def of_each_width(self) -> list[AttentionNeeds]:
        """The needs of each kind of layer."""
        return [self, *(replace(self, key_width=key, value_width=value) for key, value in sorted(self.other_widths))]

    @classmethod
    def of(
        cls,
        options: Iterable[AttentionOptions],
        max_model_len: int,
        capability: tuple[int, int],
        dtype: torch.dtype,
        cache_dtype: torch.dtype,
        key_width: int,
        value_width: int,
        block_size: int,
        latents: bool = False,
        other_widths: Iterable[tuple[int, int]] = (),
        selects: bool = False,
    ) -> AttentionNeeds:
        """Collect the needs of all layers; chunks of `max_model_len` or more do not count."""
        layers = list(options)
        return cls(
            capability,
            dtype,
            cache_dtype,
            key_width,
            value_width,
            block_size,
            chunks=any(layer.chunk_size is not None and layer.chunk_size < max_model_len for layer in layers),
            latents=latents,
            alibi=any(layer.alibi is not None for layer in layers),
            relative=any(layer.relative is not None for layer in layers),
            other_widths=frozenset(other_widths),
            selects=selects,
        )


def _reject_libraries(needs: AttentionNeeds) -> str | None:
    """Why none of the FlashAttention libraries can run; None if they can."""
    if needs.capability < (8, 0):
        return "it needs an Ampere or newer GPU"
    if needs.chunks:
        return "it has no chunked attention"
    if needs.relative:
        return "it adds no logits of relative positions"
    if needs.selects:
        return "it is planned on the host, but keys are selected on the device"
    if needs.dtype not in HALF or needs.cache_dtype != needs.dtype:
        return "it needs float16 or bfloat16 in model and cache"
    return None


def _reject_flash(needs: AttentionNeeds) -> str | None:
    if (reason := _reject_libraries(needs)) is not None:
        return reason
    if needs.key_width != needs.value_width or needs.key_width > FLASH_WIDTH or needs.key_width % 8:
        return f"heads are {needs.key_width} and {needs.value_width} wide, not both the same multiple of 8 up to 256"
    if needs.block_size % FLASH_PAGE:
        return f"cache.block_size is {needs.block_size}, not a multiple of {FLASH_PAGE}"
    return None


def _reject_flashinfer(needs: AttentionNeeds) -> str | None:
    if (reason := _reject_libraries(needs)) is not None:
        return reason
    if needs.alibi:
        return "it derives ALiBi slopes from the number of heads, of which a rank has only a part"
    if needs.latents:
        fits = (needs.key_width, needs.value_width) == LATENT_WIDTHS
        return None if fits else f"latents are {needs.key_width} numbers, not {LATENT_WIDTHS[0]}"
    if needs.key_width != needs.value_width or needs.key_width not in FLASHINFER_WIDTHS:
        return f"heads are {needs.key_width} and {needs.value_width} wide, not both 64, 128 or 256"
    return None


def _reject_triton(needs: AttentionNeeds) -> str | None:
    if needs.capability < (8, 0):
        return "it needs an Ampere or newer GPU"
    if needs.key_width > TRITON_WIDTHS[0] or needs.value_width > TRITON_WIDTHS[1]:
        return (
            f"heads are {needs.key_width} and {needs.value_width} wide, above {' and '.join(map(str, TRITON_WIDTHS))}"
        )
    return None


def _reject_torch(needs: AttentionNeeds) -> str | None:
    return None


CAPABILITIES: dict[str, Callable[[AttentionNeeds], str | None]] = {
    "flash_attn": _reject_flash,
    "flashinfer": _reject_flashinfer,
    "triton": _reject_triton,
    "torch": _reject_torch,
}
"""Backends in order of preference, each with a function that returns why it cannot be used, or None."""


@dataclass(frozen=True)
class BackendChoice:
    """The chosen backend, and why each preferred one was rejected."""

    name: str
    rejected: dict[str, str]


def choose(name: str, needs: AttentionNeeds, installed: Collection[str]) -> BackendChoice:
    """Choose the backend for `needs`: the one named, or with `auto` the first that fits.

    `installed`: the backends whose library is installed. Raises `ConfigError` if the named backend cannot be used.
    """
    rejected: dict[str, str] = {}
    for candidate in CAPABILITIES if name == "auto" else [name]:
        reason = _rejection(candidate, needs, installed)
        if reason is None:
            return BackendChoice(candidate, rejected)
        rejected[candidate] = reason
    raise ConfigError(f"runtime.attention_backend is {name}, but {rejected[name]}; use auto")


def _rejection(name: str, needs: AttentionNeeds, installed: Collection[str]) -> str | None:
    if name not in CAPABILITIES:
        return f"a GPU runs {', '.join(CAPABILITIES)}"
    if name not in installed:
        return f"{FUNCTIONS[name][0]} is not installed"
    if name == "flashinfer" and needs.latents and "triton" not in installed:
        return "triton, which attends to expanded latents, is not installed"
    reasons = map(CAPABILITIES[name], needs.of_each_width())
    return next((reason for reason in reasons if reason is not None), None)


def installed_backends() -> set[str]:
    """The backends whose library can be imported with the function that is called.

    Looking for the module would not do: some packages install a folder of that name without the function.
    """
    return {"torch", *(name for name, function in FUNCTIONS.items() if _is_importable(*function))}


def _is_importable(module: str, function: str) -> bool:
    try:
        return hasattr(importlib.import_module(module), function)
    except Exception:  # a library that does not fit the driver or torch raises anything
        return False


def make_backend(name: str, device: torch.device) -> AttentionBackend:
    """The backend of a model on a CPU (or plain torch on a GPU). Raises `ConfigError` if `name` cannot be used."""
    if name == "torch" or (name == "auto" and (device.type != "cpu" or not is_available("attention"))):
        return TorchLoopAttention()
    if name not in ("auto", "native"):
        raise ConfigError(f"runtime.attention_backend is {name!r}; choose one of auto, torch, native")
    if device.type != "cpu":
        raise ConfigError(f"runtime.attention_backend is native, which runs on a CPU, not on {device.type}; use auto")
    try:
        return NativeAttention()
    except NativeUnavailableError as error:
        raise ConfigError(f"runtime.attention_backend is native, but {error}; use auto or torch") from error


def make_gpu_backend(name: str, device: torch.device, needs: AttentionNeeds) -> AttentionBackend:
    """The backend of a model on a GPU. Raises `ConfigError` if `name` cannot be used here."""
    choice = choose(name, needs, installed_backends())
    reasons = "; ".join(f"not {other}: {reason}" for other, reason in choice.rejected.items())
    level = logging.WARNING if choice.name == "torch" and name == "auto" else logging.INFO
    logger.log(level, "attention runs on %s%s", choice.name, f" ({reasons})" if reasons else "")
    return _load(choice.name, device, needs.latents)


def _load(name: str, device: torch.device, latents: bool) -> AttentionBackend:
    if name == "flash_attn":
        from flash_attn import flash_attn_varlen_func

        from ulysses_infer.attention.flash_attn import FlashAttnAttention

        return FlashAttnAttention(flash_attn_varlen_func)
    if name == "flashinfer" and latents:
        import flashinfer.mla

        from ulysses_infer.attention.flashinfer_latent import FlashInferLatentAttention
        from ulysses_infer.attention.triton import TritonAttention

        return FlashInferLatentAttention(flashinfer, device, TritonAttention())
    if name == "flashinfer":
        import flashinfer

        from ulysses_infer.attention.flashinfer import FlashInferAttention

        return FlashInferAttention(flashinfer, device)
    if name == "triton":
        from ulysses_infer.attention.triton import TritonAttention

        return TritonAttention()
    return TorchLoopAttention()
