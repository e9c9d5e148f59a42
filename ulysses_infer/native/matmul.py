"""Matrix products of linear layers by `native/products/matmul.c`."""

from __future__ import annotations

import functools
import itertools
import logging
import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch.nn import functional as F

from ulysses_infer.errors import ConfigError
from ulysses_infer.native.choice import TORCH, Choice, measured_choice
from ulysses_infer.native.experts import NAMES, NativeExperts
from ulysses_infer.native.function import MATMUL, NativeFunction, is_recording
from ulysses_infer.native.library import NativeUnavailableError, is_switched_off, open_library

logger = logging.getLogger(__name__)
Weights = tuple[torch.Tensor, torch.Tensor | None]
"""A weight and its bias."""
KERNELS = ("few", "pairs", "panels")
"""few: each weight is read once, for few rows. pairs: bfloat16 dot products, on CPUs that have them. panels: float32
multiply-adds of weights that are converted once for many rows."""
MOST_JOINT = 3  # as in panels.h
MEASURED_SHAPE = (1024, 1024)
MEASURED_BYTES = 96_000_000  # of weights that are visited one after another, so that they come from memory
WITHOUT_KERNELS = (  # figures: python -m benchmarks.measure_without_kernels
    "no native kernels (%s): torch computes instead; decode steps take 1.5 to 10 times as long, most in small models, "
    "prompts 1.2 to 5 times, most with AVX2; install gcc or clang, or a wheel, which ships compiled kernels"
)


class NativeMatmul:
    """Products by the kernel of `native/products/matmul.c`, or by torch, that is fastest for the number of rows.

    A kernel's result for a row does not depend on the other rows; kernels differ in the order of float32 sums. Raises
    `NativeUnavailableError` if the library cannot be built.
    """

    name = "native"

    def __init__(self, choices: Mapping[torch.dtype, Choice] | None = None) -> None:
        """choices: kernels by number of rows. None: as measured on this processor."""
        library = open_library("matmul")
        self.kernels = {
            dtype: {
                kernel: NativeFunction(library, f"{kernel}_{name}", "ppppiiiii", MATMUL, _raise_memory_error)
                for kernel in KERNELS
                if hasattr(library, f"{kernel}_{name}")
            }
            for dtype, name in NAMES.items()
        }
        """The kernels of each type that this processor has."""
        self._joint = {
            dtype: NativeFunction(library, f"joint_{name}", "piii" + MOST_JOINT * "pppii", MATMUL, _raise_memory_error)
            for dtype, name in NAMES.items()
        }
        self.choices = dict(choices) if choices is not None else {dtype: self._measured(dtype) for dtype in NAMES}

    def __call__(self, inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """See `linear`."""
        return self._multiply(self._kernel(inputs, weight), inputs, weight, bias)

    def joint(self, inputs: torch.Tensor, weights: Sequence[Weights]) -> list[torch.Tensor]:
        """See `linears`. `panels` converts and shares the inputs once for up to `MOST_JOINT` weights."""
        kernels = [self._kernel(inputs, weight) for weight, _ in weights]
        if set(kernels) == {"panels"} and 1 < len(weights) <= MOST_JOINT:
            return _multiply_joint(self._joint[inputs.dtype], inputs.contiguous(), weights)
        return [self._multiply(kernel, inputs, *pair) for kernel, pair in zip(kernels, weights, strict=True)]

    def _multiply(
        self, kernel: str, inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        if kernel == TORCH:
            return F.linear(inputs, weight, bias)
        return _multiply(self.kernels[weight.dtype][kernel], inputs.contiguous(), weight, bias)

    def _kernel(self, inputs: torch.Tensor, weight: torch.Tensor) -> str:
        choice, rows = self.choices.get(weight.dtype), inputs.numel() // weight.shape[1]
        fits = weight.stride(1) == 1 and inputs.dtype == weight.dtype and rows > 0
        return choice(rows) if choice is not None and fits else TORCH

    def of_experts(
        self, tokens: torch.Tensor, matrices: torch.Tensor, bias: torch.Tensor | None, ends: torch.Tensor
    ) -> torch.Tensor | None:
        """`NativeExperts.multiply` with the measured kernels; None if it does not serve, or torch is faster."""
        choice = self.choices.get(tokens.dtype)
        if choice is None or not self.experts.serves(tokens, matrices):
            return None
        if not is_recording() and choice(max(1, len(tokens) // len(matrices))) == TORCH:
            return None
        return self.experts.multiply(tokens, matrices, bias, ends, choice)

    @functools.cached_property
    def experts(self) -> NativeExperts:
        """Products of the dense matrices of a layer's experts; compiled when they are first needed."""
        return NativeExperts()

    def adopt(self, choices: Mapping[torch.dtype, Choice]) -> None:
        """Use another rank's choices, as far as this rank's processor has their kernels."""
        for dtype, choice in choices.items():
            if set(choice.kernels.values()) <= {TORCH, *self.kernels[dtype]}:
                self.choices[dtype] = choice

    def _measured(self, dtype: torch.dtype) -> Choice:
        weights: list[torch.Tensor] = []

        def prepare(kernel: str, rows: int) -> Callable[[], object]:
            if not weights:  # only where nothing has been measured yet
                count = max(2, MEASURED_BYTES // (math.prod(MEASURED_SHAPE) * dtype.itemsize))
                weights.extend(torch.full(MEASURED_SHAPE, 0.5, dtype=dtype) for _ in range(count))
            visited, inputs = itertools.cycle(weights), torch.ones(rows, MEASURED_SHAPE[1], dtype=dtype)
            if kernel == TORCH:
                return lambda: F.linear(inputs, next(visited))
            function = self.kernels[dtype][kernel]
            return lambda: _multiply(function, inputs, next(visited), None)

        return measured_choice("matmul", f"matmul-{NAMES[dtype]}", (*self.kernels[dtype], TORCH), prepare)


def _multiply(
    function: NativeFunction, inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """inputs: contiguous; weight: rows of adjacent elements."""
    outputs, width = weight.shape
    result = inputs.new_empty(*inputs.shape[:-1], outputs)
    function(
        inputs.data_ptr(),
        weight.data_ptr(),
        None if bias is None else bias.data_ptr(),
        result.data_ptr(),
        inputs.numel() // width,
        outputs,
        width,
        width,
        weight.stride(0),
    )
    return result


def _multiply_joint(function: NativeFunction, inputs: torch.Tensor, weights: Sequence[Weights]) -> list[torch.Tensor]:
    """inputs: contiguous; weights: rows of adjacent elements."""
    width = inputs.shape[-1]
    results = [inputs.new_empty(*inputs.shape[:-1], len(weight)) for weight, _ in weights]
    arguments: list[int | None] = []
    for (weight, bias), result in zip(weights, results, strict=True):
        address = None if bias is None else bias.data_ptr()
        arguments += [weight.data_ptr(), address, result.data_ptr(), len(weight), weight.stride(0)]
    unused = [None, None, None, 0, 0] * (MOST_JOINT - len(weights))
    function(inputs.data_ptr(), inputs.numel() // width, width, len(weights), *arguments, *unused)
    return results


def make_matmul(name: str, device: torch.device) -> NativeMatmul | None:
    """The backend of `runtime.matmul_backend`; None means torch. Raises `ConfigError` if it is not available here."""
    if name == TORCH or (name == "auto" and device.type != "cpu"):
        return None
    if device.type != "cpu":
        raise ConfigError(f"runtime.matmul_backend is native, which runs on a CPU, not on {device.type}; use auto")
    try:
        return NativeMatmul()
    except NativeUnavailableError as error:
        if name != "auto":
            raise ConfigError(f"runtime.matmul_backend is native, but {error}; use auto or torch") from error
        if not is_switched_off():
            logger.warning(WITHOUT_KERNELS, error)
        return None


def _raise_memory_error(_: int) -> None:
    raise MemoryError("out of memory for the inputs of a matrix product")
