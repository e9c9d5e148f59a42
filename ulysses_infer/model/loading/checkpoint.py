"""Loader: reads one rank's slices from a checkpoint, using transformers' key renames and weight conversions."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from ulysses_infer.errors import CheckpointError, first_line
from ulysses_infer.model.experts.keys import ExpertKeys
from ulysses_infer.model.experts.matrix import ExpertMatrix
from ulysses_infer.model.injection.inject import Injection
from ulysses_infer.model.loading.files import TensorSource, take
from ulysses_infer.model.quantization.linear import QuantizedLinear
from ulysses_infer.model.quantization.online import OnlineExperts, OnlineWeight
from ulysses_infer.model.quantization.reading import check_plain
from ulysses_infer.parallel.layout import Span

OF_HEAD = ".stored"
"""Suffix of the name of a quantised vocabulary head's weight (`ShardedHead.stored`)."""
THINKER = "thinker."
"""Prefix of the text model's tensors in the checkpoint of a speech pipeline."""
Progress = Callable[[int, int], None]  # (parameters done, parameters in all)
Slice = tuple[int, list[Span]] | None
_Key = tuple[str, str | None]  # (checkpoint key, converter's source pattern)


@dataclass
class _Target:
    """The checkpoint tensors that make one parameter (or, for a splitting conversion, several)."""

    converter: WeightConverter | None = None
    keys: list[tuple[str, str | None]] = field(default_factory=list)  # (checkpoint key, converter's source pattern)
    experts: dict[int | None, str] = field(default_factory=dict)  # quantized experts: checkpoint key by expert


class KeyNames:
    """Maps checkpoint keys to parameter names, using transformers' renames and weight conversions."""

    def __init__(self, model: Any) -> None:
        self.known: dict[str, torch.Tensor] = dict(model.state_dict())
        self.prefix = model.base_model_prefix
        # heads for drafting are no transformers models
        transforms = get_model_conversion_mapping(getattr(model, "converted_like", None) or model)
        self.renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
        self.converters = [t for t in transforms if isinstance(t, WeightConverter)]

    def replace(self, names: Iterable[str], others: Iterable[str]) -> None:
        """Know `others`, dense weights that are quantised while loading, in place of `names`, what is made of them."""
        for name in names:
            self.known.pop(name, None)
        self.known |= {name: torch.empty(0, device="meta") for name in others}

    def rename(self, key: str, known: dict[str, Any] | None = None) -> tuple[str, str | None]:
        """The parameter that the checkpoint's `key` belongs to, and the source pattern of its conversion, if any.

        known: the valid names; by default those of the model's state dict.
        """
        known = self.known if known is None else known
        name, pattern = rename_source_key(key, self.renamings, self.converters, self.prefix, known)
        if name not in known and key in known:
            name, pattern = rename_source_key(key, [], [], self.prefix, known)
        if name not in known and key.startswith(THINKER):
            return self.rename(key.removeprefix(THINKER), known)
        return name, pattern


class Loader:
    """Loads one rank's weights parameter by parameter, so that at most one parameter is in memory twice."""

    def __init__(
        self,
        injection: Injection,
        source: TensorSource,
        full_shapes: Mapping[str, tuple[int, ...]],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.injection, self.model, self.source, self.full_shapes = injection, injection.model, source, full_shapes
        self.dtype, self.device = dtype, device
        self.parameters = dict(self.model.named_parameters(remove_duplicate=False))
        self.buffers = dict(self.model.named_buffers())
        self.float32 = _float32_pattern(self.model, dtype)
        self.quantized = {n: m for n, m in self.model.named_modules() if isinstance(m, QuantizedLinear)}
        self.online = _online_weights(self.model)
        made = {f"{owner}.{leaf}" for owner, online in self.online.values() for leaf in online.components}
        self.left = set(self.parameters) | (set(self.buffers) & set(self.model.state_dict()))
        self.left = self.left - made | set(self.online)
        self.names = KeyNames(self.model)
        self.names.replace(made, self.online)
        positions = {p: i for c in self.names.converters for i, p in enumerate(c.source_patterns)}
        self.expert_keys = ExpertKeys(self.model, positions)

    def load(self, progress: Progress | None = None) -> None:
        """Fill every parameter. Raises `CheckpointError` for tensors that are missing or of the wrong shape."""
        targets = self._targets()
        for done, (name, target) in enumerate(targets.items(), start=1):
            if target.experts:
                self._place(name, self.expert_keys.read(name, self.source, target.experts))
            elif target.converter is None:
                self._place(name, self._read_whole_or_slice(name, target.keys[-1][0]))
            else:
                self._convert(name, target.converter, target.keys)
            if progress is not None:
                progress(done, len(targets))
        self._share_tied()
        self._check_nothing_left()

    def _targets(self) -> dict[str, _Target]:
        by_pattern = {pattern: c for c in self.names.converters for pattern in c.source_patterns}
        known = self.names.known
        targets: dict[str, _Target] = {}
        for key in sorted(self.source.keys(), key=dot_natural_key):
            if self._is_expert_tensor(key, targets):
                continue
            name, pattern = self.names.rename(key)
            owner, _, leaf = name.rpartition(".")
            if name not in known and owner in self.quantized:
                self.quantized[owner].check_foreign(leaf, self.source, key)
            if name in known:
                target = targets.setdefault(name, _Target())
                target.keys.append((key, pattern))
                if pattern is not None and target.converter is None:
                    target.converter = copy.deepcopy(by_pattern[pattern])
        return {**self._tied(targets), **targets}

    def _tied(self, targets: Mapping[str, _Target]) -> dict[str, _Target]:
        """Tied parameters of which this rank keeps another part than of those that they are tied to."""
        return {
            name: targets[other]
            for name, other in self._pairs().items()
            if name in self.left and other in targets and not self._alike(name, other)
        }

    def _share_tied(self) -> None:
        """Make tied parameters, which checkpoints store once, one tensor where this rank keeps the same part."""
        for name, other in self._pairs().items():
            if name in self.left and other not in self.left and self._alike(name, other):
                owner, _, leaf = name.rpartition(".")
                setattr(self.model.get_submodule(owner), leaf, self.model.get_parameter(other))
                self.left.discard(name)

    def _pairs(self) -> Mapping[str, str]:
        """The parameter that each tied one is tied to."""
        pairs: Mapping[str, str] = getattr(self.model, "all_tied_weights_keys", {})
        return pairs

    def _alike(self, name: str, other: str) -> bool:
        shapes = [self.parameters[each].shape for each in (name, other) if each in self.parameters]
        return len(shapes) == 2 and shapes[0] == shapes[1] and self._slices(name) == self._slices(other)

    def _slices(self, name: str) -> Slice:
        """What to read of the tensor `name`: (dimension, spans), or None for all of it."""
        if name in self.online:
            return self.online[name][1].dense_slices()
        kept: Slice = self.injection.slices(name)
        return kept

    def _is_expert_tensor(self, key: str, targets: dict[str, _Target]) -> bool:
        """Whether `key` belongs to quantized experts; if so, adds it to `targets`."""
        found = self.expert_keys.find(key, self.names.rename)
        if found is None:
            return False
        name = f"{found.matrix}.{found.leaf}"
        if name in self.names.known:
            targets.setdefault(name, _Target()).experts[found.expert] = key
        else:
            self.expert_keys.check_foreign(found, self.source, key)
        return True

    def _read_whole_or_slice(self, name: str, key: str) -> torch.Tensor:
        owner, _, leaf = name.rpartition(".")
        if owner in self.quantized and name not in self.online:
            return self.quantized[owner].read(leaf, self.source, key)
        found, wanted = self.source.shape(key), self.full_shapes.get(name)
        if wanted is not None and found != wanted:
            raise CheckpointError(_wrong_shape(key, found, wanted))
        return check_plain(key, self.source.read(key, self._slices(name)))

    def _convert(self, name: str, converter: WeightConverter, keys: list[tuple[str, str | None]]) -> None:
        """Run a weight conversion: on slices if it only stacks and concatenates, otherwise on full tensors."""
        kept = self._slices(name)
        if kept is not None and _joins_rows(converter, kept):
            self._place(name, self._own_rows(name, keys, kept[1]))
            return
        sliced = _sliced_sources(converter, kept) if kept is not None else None
        if sliced is not None and kept is not None and kept[0] == 0:
            keys = self._own_experts(name, keys, kept[1])
            if not keys:  # more ranks than experts: this one has none
                self._place(name, torch.empty_like(self._expected(name), device="cpu"))
                return
        elif sliced is not None:
            self._check_sliced(name, keys, kept)
        for key, pattern in keys:
            part = sliced.get(pattern or "") if sliced is not None else None
            converter.add_tensor(name, key, pattern, _DeferredRead(self.source, key, part))  # type: ignore[arg-type]
        try:
            shapes: Any = _UnslicedShapes(self.full_shapes)
            converted = converter.convert(name, model=shapes, config=self.model.config)
        except RuntimeError as error:  # shapes that cannot be stacked or concatenated
            reason = first_line(error)
            raise CheckpointError(
                f"the tensors of {name} do not fit together ({reason}); the weights do not belong to this config.json"
            ) from error
        for target, value in converted.items():
            tensor = value[0] if isinstance(value, list) else value
            wanted = self._slices(target)
            already = sliced is not None and target == name
            self._place(target, tensor if already or wanted is None else _cut(tensor, wanted))

    def _own_rows(self, name: str, keys: list[_Key], own: list[Span]) -> torch.Tensor:
        """The rows `own` of a parameter that the checkpoint has cut into tensors of rows; reads no others."""
        parts, start = [], 0
        for key, _ in keys:
            stop = start + self.source.shape(key)[0]
            spans = [Span(max(span.start, start) - start, min(span.stop, stop) - start) for span in own]
            found = [span for span in spans if span.start < span.stop]
            parts += [check_plain(key, self.source.read(key, (0, found)))] if found else []
            start = stop
        if start != self.full_shapes[name][0]:
            raise CheckpointError(_wrong_shape(name, (start, *self.full_shapes[name][1:]), self.full_shapes[name]))
        return torch.cat(parts)

    def _own_experts(self, name: str, keys: list[_Key], own: list[Span]) -> list[_Key]:
        """The keys of the experts on this rank; tensors of other experts are not read."""
        num_experts, chosen = self.full_shapes[name][0], list[_Key]()
        for pattern in dict.fromkeys(pattern for _, pattern in keys):
            experts = [key for key in keys if key[1] == pattern]
            if len(experts) != num_experts:
                raise CheckpointError(
                    f"the checkpoint has {len(experts)} tensors like {experts[0][0]}, but the model's config makes it "
                    f"{num_experts} experts; it is incomplete, or the weights do not belong to this config.json"
                )
            chosen += [key for span in own for key in experts[span.start : span.stop]]
        return chosen

    def _check_sliced(self, name: str, keys: list[tuple[str, str | None]], kept: Slice) -> None:
        """Check full shapes, because a slice of a tensor that is too large would have the right shape."""
        assert kept is not None
        wanted = self.full_shapes[name][kept[0]] // len({pattern for _, pattern in keys})
        for key, _ in keys:
            found = self.source.shape(key)
            if found[kept[0] - 1 : kept[0]] != (wanted,):
                whole = (*found[: kept[0] - 1], wanted, *found[kept[0] :])
                raise CheckpointError(_wrong_shape(key, found, whole))

    def _place(self, name: str, tensor: torch.Tensor) -> None:
        """Make `tensor` the parameter or buffer `name`."""
        if name not in self.left:
            return
        self.left.discard(name)
        if name not in self.online:
            self._place_stored(name, tensor)
            return
        owner, online = self.online[name]
        expected = self._expected(name)
        if tensor.shape != expected.shape:
            raise CheckpointError(_wrong_shape(name, tuple(tensor.shape), tuple(expected.shape)))
        dense = check_plain(name, tensor)
        dense = dense if dense.is_meta else dense.to(self.device)  # without values if only shapes are checked
        for leaf, part in online.quantise(dense).items():
            self._place_stored(f"{owner}.{leaf}", part)

    def _expected(self, name: str) -> torch.Tensor:
        """A tensor of the shape in which `name` is read: for weights that are quantised while loading, a dense one."""
        if name not in self.online:
            return self.parameters[name]
        whole = torch.empty(self.full_shapes[name], dtype=self.dtype, device="meta")
        return take(whole, self.online[name][1].dense_slices())

    def _place_stored(self, name: str, tensor: torch.Tensor) -> None:
        current = self.parameters.get(name, self.buffers.get(name))
        assert current is not None
        rows = current.shape[: current.dim() - tensor.dim() + 1]
        if len(rows) in (2, 3) and math.prod(rows) == len(tensor):  # a stacked parameter
            tensor = tensor.unflatten(0, rows)
        if tensor.shape != current.shape:
            raise CheckpointError(_wrong_shape(name, tuple(tensor.shape), tuple(current.shape)))
        self.store(name, current, tensor)

    def store(self, name: str, current: torch.Tensor, tensor: torch.Tensor) -> None:
        """Replace the parameter or buffer `current` by `tensor`, which has the same shape."""
        owner_name, _, leaf = name.rpartition(".")
        owner = self.model.get_submodule(owner_name)
        dtype = current.dtype if name in self.buffers else self._dtype_of(name, current)
        value = tensor.to(device=self.device, dtype=dtype)
        if name in self.buffers:
            owner.register_buffer(leaf, value)
        else:
            setattr(owner, leaf, nn.Parameter(value, requires_grad=False))

    def _dtype_of(self, name: str, current: torch.Tensor) -> torch.dtype:
        keep = self.float32 is not None and self.float32.search(name)
        return torch.float32 if keep else current.dtype

    def _check_nothing_left(self) -> None:
        missing = sorted(name for name in self.left if name in self.parameters or name in self.online)
        if missing:
            raise CheckpointError(
                f"the checkpoint lacks {len(missing)} of {len(self.parameters)} tensors the model needs, "
                f"first {missing[0]}; it is incomplete or of another architecture"
            )


def _online_weights(model: Any) -> dict[str, tuple[str, OnlineWeight | OnlineExperts]]:
    """Dense weights that are quantised while loading, by name: the module that stores what is made of each, and how."""
    found: dict[str, tuple[str, OnlineWeight | OnlineExperts]] = {}
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLinear) and module.online is not None:
            found[f"{name.removesuffix(OF_HEAD)}.weight"] = name, module.online
        elif isinstance(module, ExpertMatrix) and module.online is not None:
            found[name] = name, module.online
    return found


class _UnslicedShapes:
    """Stands in for the model in weight conversions; reports parameter shapes before slicing."""

    def __init__(self, full_shapes: Mapping[str, tuple[int, ...]]) -> None:
        self.full_shapes = full_shapes

    def get_parameter(self, name: str) -> torch.Tensor:
        """A meta tensor of the full parameter's shape."""
        return torch.empty(self.full_shapes[name], device="meta")


class _DeferredRead:
    """A read deferred until transformers' conversion calls it."""

    def __init__(self, source: TensorSource, key: str, kept: Slice) -> None:
        self.source, self.key, self.kept = source, key, kept

    def __call__(self) -> torch.Tensor:
        return check_plain(self.key, self.source.read(self.key, self.kept))


def _joins_rows(converter: WeightConverter, kept: tuple[int, list[Span]]) -> bool:
    """Whether the conversion only joins numbered tensors of rows, of which this rank keeps some."""
    operations, is_numbered = converter.operations, len(converter.source_patterns) == 1
    joins = len(operations) == 1 and isinstance(operations[0], Concatenate) and operations[0].dim == 0
    return is_numbered and joins and kept[0] == 0


def _sliced_sources(converter: WeightConverter, kept: tuple[int, list[Span]]) -> dict[str, Slice] | None:
    """The slice to read from each source so that stacking experts and joining gate and up gives this rank's slice.

    None if the conversion has other operations, or if a span crosses sources.
    """
    names = [type(op) for op in converter.operations]
    stacked = bool(names) and names[0] is MergeModulelist
    if not stacked or any(name not in (MergeModulelist, Concatenate) for name in names):
        return None
    dimension, spans = kept
    patterns = converter.source_patterns
    if dimension == 0:  # whole experts, chosen before they are read
        return dict.fromkeys(patterns)
    if len(patterns) == 1:
        return {patterns[0]: (dimension - 1, spans)}
    joined = [op for op in converter.operations if isinstance(op, Concatenate)]
    if len(spans) != len(patterns) or len(joined) != 1 or joined[0].dim != dimension:
        return None
    # Each source is one part of the joined dimension; all parts are cut alike, so the first span serves for each.
    return {pattern: (dimension - 1, [spans[0]]) for pattern in patterns}


def _wrong_shape(name: str, found: tuple[int, ...], wanted: tuple[int, ...]) -> str:
    return (
        f"tensor {name} has shape {list(found)}, but the model's config makes it {list(wanted)}; "
        "the weights do not belong to this config.json"
    )


def _cut(tensor: torch.Tensor, kept: tuple[int, list[Span]]) -> torch.Tensor:
    dimension, spans = kept
    return torch.cat([tensor.narrow(dimension, span.start, span.size) for span in spans], dim=dimension)


def _float32_pattern(model: Any, dtype: torch.dtype) -> re.Pattern[str] | None:
    """Matches parameters that the architecture keeps in float32 regardless of the checkpoint's dtype."""
    names = set(model._keep_in_fp32_modules_strict or ()) if dtype in (torch.float16, torch.bfloat16) else set()
    if dtype == torch.float16:
        names |= set(model._keep_in_fp32_modules or ())
    escaped = [re.escape(name).replace(r"\*", r"[^.]+") for name in sorted(names)]
    return re.compile("|".join(escaped)) if escaped else None
