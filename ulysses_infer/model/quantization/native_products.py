"""Products with quantized weights on a CPU (`native/products/quantised.c`), which reads them as they are stored."""

from __future__ import annotations

import ctypes
import functools
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch

from ulysses_infer.kernels.experts_weights import StoredExperts
from ulysses_infer.model.context import step_context_or_none
from ulysses_infer.model.layers.linear import Cut
from ulysses_infer.native.choice import ROWS, TORCH, Choice, measured_choice
from ulysses_infer.native.function import MATMUL, NativeFunction
from ulysses_infer.native.library import is_available, open_library
from ulysses_infer.native.matmul import MEASURED_BYTES, MEASURED_SHAPE, NativeMatmul
from ulysses_infer.parallel.sharding import Sharding

SEGMENT = 64
"""Inputs that share a scale when inputs are quantised, at most: with 128, outliers of small models cost 1 % of the
perplexity."""
BY_ROWS, STORED = "rows", "stored"
GROUP = 32
"""Inputs per scale of the weights of four bits that are measured."""
TYPES = {torch.float32: 0, torch.bfloat16: 1}  # `enum type`
SCALES = {torch.float32: 0, torch.uint8: 1, torch.bfloat16: 2}  # `enum scales`
PACKED = {"": 0, "inputs": 1, "outputs": 2}
_INT8, _E4M3, _PACKED, _E2M1 = range(4)  # `enum values`
_FIELDS = (
    "outputs",
    "inputs",
    "first_output",
    "first_input",
    "code_output",
    "code_input",
    "scale_output",
    "scale_input",
    "zero_output",
    "zero_input",
    "codes_expert",
    "scales_expert",
    "zeros_expert",
    "groups_expert",
    "values",
    "packed",
    "bits",
    "interleaved",
    "scale_outputs",
    "group_size",
    "scale_type",
    "float_zeros",
    "zero",
    "segment",
)


class _Stored(ctypes.Structure):
    """`struct stored` of stored_weights.h."""

    _fields_ = tuple((name, ctypes.c_void_p) for name in ("codes", "scales", "zeros", "groups")) + tuple(
        (name, ctypes.c_int64) for name in _FIELDS
    )


def segment_of(cut: Cut, sharding: Sharding, world_size: int) -> int:
    """Inputs that share a scale when inputs are quantised: the same segments in every mode, if slices end at 32s."""
    if cut == "column":
        return SEGMENT
    edges = [edge for index in range(world_size) for span in sharding.spans(index, world_size) for edge in span]
    return SEGMENT if math.gcd(*edges) % SEGMENT == 0 else SEGMENT // 2


class NativeWeights:
    """A matrix of one or more experts, as views of what a checkpoint stores, for products on a CPU."""

    def __init__(self, stored: StoredExperts, segment: int = SEGMENT) -> None:
        """segment: inputs that share a scale when inputs are quantised; slices end at multiples."""
        self._stored, self.outputs = stored, stored.outputs  # keeps the tensors alive
        self._struct = _struct_of(stored, segment)
        fits = stored.values != "integer" or stored.bits <= 4 or (stored.zeros is None and stored.zero == 128)
        is_float = stored.codes.dtype == torch.float8_e4m3fn
        self._has_integers = fits and not is_float and stored.groups is None and stored.first_input % 8 == 0
        self._product, self._experts = _functions()

    def serves(self, rows: torch.Tensor) -> bool:
        """Whether `rows` [n, inputs] can be multiplied here, in a step whose products are native."""
        step = step_context_or_none()
        if step is None or step.matmul is None or rows.dtype not in TYPES or rows.stride(-1) != 1:
            return False
        return self._uses_integers(rows) or len(rows) <= most_float_rows(rows.dtype, step.matmul)

    def _uses_integers(self, rows: torch.Tensor) -> bool:
        """Whether inputs are quantised: where the model is in float32, results are exact instead."""
        return self._has_integers and rows.dtype != torch.float32

    def _by_rows(self, rows: torch.Tensor) -> int:
        """The C functions' last argument: -1, or up to how many rows the lanes are inputs."""
        return self.most_by_rows() if self._uses_integers(rows) else -1

    def most_by_rows(self) -> int:
        """The most rows for which lanes are inputs, if inputs are quantised. Measured when it is first asked."""
        if not self._has_integers:
            return 0
        if self._struct.values == _INT8:
            return most_rows(8)
        is_measured = self._struct.values == _PACKED and self._struct.bits == 4 and self._stored.packed == "inputs"
        return most_rows(4) if is_measured else 0

    def product(self, rows: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """rows: [n, inputs]; returns [n, outputs] of the only expert, plus `bias`."""
        return self.multiply(rows, bias, self._by_rows(rows))

    def multiply(self, rows: torch.Tensor, bias: torch.Tensor | None, by_rows: int) -> torch.Tensor:
        """`product` by the kernel that `by_rows` says, see `quantised_product` in C."""
        output = rows.new_empty(len(rows), self.outputs)
        self._product(
            ctypes.byref(self._struct),
            rows.data_ptr(),
            None if bias is None else bias.data_ptr(),
            output.data_ptr(),
            len(rows),
            rows.stride(0),
            TYPES[rows.dtype],
            by_rows,
        )
        return output

    def experts_product(self, rows: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
        """rows: [n, inputs], those of expert e before row `ends[e]` (int32); returns [n, outputs].

        Rows after the last are undefined.
        """
        output = rows.new_empty(len(rows), self.outputs)
        self._experts(
            ctypes.byref(self._struct),
            rows.data_ptr(),
            output.data_ptr(),
            ends.data_ptr(),
            len(ends),
            rows.stride(0),
            TYPES[rows.dtype],
            self._by_rows(rows),
        )
        return output


def native_weights(stored: StoredExperts, segment: int = SEGMENT) -> NativeWeights | None:
    """`stored` for products on a CPU; None if this format, or this machine, has none."""
    formats = (torch.int8, torch.float8_e4m3fn) if stored.values == "float" else (torch.int32,)
    is_readable = stored.codes.device.type == "cpu" and stored.codes.dtype in formats
    if not is_readable or not is_available("quantised"):
        return None
    made = NativeWeights(stored, segment)
    made.most_by_rows()  # measures now, while the model loads, not in its first step
    return made


@functools.cache
def _functions() -> tuple[NativeFunction, NativeFunction]:
    library = open_library("quantised")
    one = NativeFunction(library, "quantised_product", "ppppiiii", MATMUL, _check)
    return one, NativeFunction(library, "quantised_experts", "ppppiiii", MATMUL, _check)


@functools.cache
def most_rows(bits: int) -> int:
    """Up to how many rows the products of `integer_rows.h`, for 8 bits, or of `nibble_rows.h`, for 4, are the faster
    ones, as measured here once."""
    weights: list[NativeWeights] = []

    def prepare(kernel: str, rows: int) -> Callable[[], object]:
        if not weights:
            weights.extend(_measured_weights(bits))
        visited, inputs = itertools.cycle(weights), torch.ones(rows, MEASURED_SHAPE[1], dtype=torch.bfloat16)
        by_rows = rows if kernel == BY_ROWS else 0
        return lambda: next(visited).multiply(inputs, None, by_rows)

    return _most(measured_choice("quantised", f"quantised-int{bits}", (BY_ROWS, "panels"), prepare), BY_ROWS)


def _measured_weights(bits: int) -> Iterator[NativeWeights]:
    """Matrices of int8 with a scale per output, or of four bits as `model.quantize` makes them, from memory."""
    outputs, inputs = MEASURED_SHAPE
    for _ in range(MEASURED_BYTES * 8 // (bits * outputs * inputs)):
        if bits == 8:
            codes, scales = torch.ones(1, outputs, inputs, dtype=torch.int8), torch.ones(1, outputs, 1)
            yield NativeWeights(StoredExperts(codes, outputs, inputs, scales=scales))
        else:
            words = torch.ones(1, outputs, inputs // 8, dtype=torch.int32)
            groups = torch.ones(1, outputs, inputs // GROUP, dtype=torch.bfloat16)
            form: dict[str, Any] = {"values": "integer", "packed": "inputs", "bits": 4, "group_size": GROUP}
            yield NativeWeights(StoredExperts(words, outputs, inputs, **form, scales=groups, zeros=groups))


@functools.cache
def most_float_rows(dtype: torch.dtype, matmul: NativeMatmul) -> int:
    """Up to how many rows products of inputs that are not quantised are faster from what is stored than with a weight
    that is expanded first, as measured here once with weights in FP8. matmul: the products of dense weights."""
    outputs, inputs = MEASURED_SHAPE
    codes = torch.ones(1, outputs, inputs).to(torch.float8_e4m3fn)
    scales = torch.ones(1, outputs, 1)

    def prepare(kernel: str, rows: int) -> Callable[[], object]:
        given = torch.ones(rows, inputs, dtype=dtype)
        if kernel == TORCH:
            return lambda: matmul(given, (codes[0].float() * scales[0]).to(dtype))
        weights = NativeWeights(StoredExperts(codes, outputs, inputs, scales=scales))
        return lambda: weights.multiply(given, None, -1)

    name = f"quantised-{str(dtype).removeprefix('torch.')}"
    return _most(measured_choice("quantised", name, (STORED, TORCH), prepare), STORED)


def _most(choice: Choice, kernel: str) -> int:
    """The most rows for which `kernel` is the fastest, of those that are measured; 0 if there are none."""
    return max((rows for rows in range(1, ROWS[-1] + 1) if choice(rows) == kernel), default=0)


def _check(status: int) -> None:
    """Raise the error of a product that failed."""
    raise MemoryError("no memory for the intermediate results of a quantised matrix product")


def _struct_of(stored: StoredExperts, segment: int) -> _Stored:
    codes, scales, zeros, groups = stored.codes, stored.scales, stored.zeros, stored.groups
    is_float = stored.values == "float"
    kind = (_INT8 if codes.dtype == torch.int8 else _E4M3) if is_float else _PACKED
    code_steps, scale_steps, zero_steps = _steps(codes), _steps(scales), _steps(zeros)
    return _Stored(
        codes=codes.data_ptr(),
        scales=None if scales is None else scales.data_ptr(),
        zeros=None if zeros is None else zeros.data_ptr(),
        groups=None if groups is None else groups.data_ptr(),
        outputs=stored.outputs,
        inputs=stored.inputs,
        first_output=stored.first_output,
        first_input=stored.first_input,
        code_output=code_steps[1] * codes.element_size(),
        code_input=code_steps[2] * codes.element_size(),
        scale_output=scale_steps[1],
        scale_input=scale_steps[2],
        zero_output=zero_steps[1],
        zero_input=zero_steps[2],
        codes_expert=code_steps[0] * codes.element_size(),
        scales_expert=0 if scales is None else scale_steps[0] * scales.element_size(),
        zeros_expert=0 if zeros is None else zero_steps[0] * zeros.element_size(),
        groups_expert=0 if groups is None else groups.stride(0) * groups.element_size(),
        values=_E2M1 if stored.values == "e2m1" else kind,
        packed=PACKED[stored.packed],
        bits=stored.bits or 8,
        interleaved=int(stored.interleaved),
        scale_outputs=stored.scale_outputs,
        group_size=0 if stored.groups is not None else stored.group_size,
        scale_type=SCALES[torch.float32 if scales is None else scales.dtype],
        float_zeros=int(zeros is not None and zeros.is_floating_point()),
        zero=stored.zero,
        segment=segment,
    )


def _steps(values: torch.Tensor | None) -> tuple[int, int, int]:
    """Elements from one index to the next; 0 along a dimension of size 1, whose index covers all features."""
    if values is None:
        return 0, 0, 0
    expert, output, value = (0 if size == 1 else step for size, step in zip(values.shape, values.stride(), strict=True))
    return expert, output, value
