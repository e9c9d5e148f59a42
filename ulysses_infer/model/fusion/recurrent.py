"""Proves that the native form of a recurrent layer's inner part computes what transformers' forward computes."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch

from ulysses_infer.cache.states import StateCache, StateSequences
from ulysses_infer.model.fusion.equivalence import MISMATCH_ERRORS, is_close
from ulysses_infer.model.recurrent.gpu_functions import missing_packages, runs_gpu_functions
from ulysses_infer.model.recurrent.layer import InnerForm, RecurrentLayer
from ulysses_infer.model.recurrent.runs import Run, runs_of

LENGTHS = (1, 5)  # a decode and a chunk of a prompt, which transformers computes differently
logger = logging.getLogger(__name__)
SLOTS = (2, 0)
SCALES = (1.0, 4.0)


@torch.inference_mode()
def is_equivalent_form(layer: RecurrentLayer, form: InnerForm, dtype: torch.dtype) -> bool:
    """Whether `form` gives the results and the states that the layer's own forward gives, on random inputs."""
    random = torch.Generator().manual_seed(layer.module.layer_idx)
    for length in LENGTHS:
        run = runs_of(StateSequences(torch.tensor(SLOTS), [length] * len(SLOTS)))[0]
        for scale in SCALES:
            inputs = [
                (torch.randn(len(SLOTS) * length, size, generator=random) * scale).to(dtype)
                for size in layer.own_widths
            ]
            if not _is_equal(layer, form, run, inputs, random):
                return False
    return True


def warn_of_missing_packages(layers: Sequence[RecurrentLayer], device: torch.device) -> None:
    """Say which packages would make recurrent layers faster on a GPU; one rank of a replica does, for all."""
    first = [layer for layer in layers if layer.owner.shard == 0 and layer.rule.forward is None]
    missing = {name for layer in first for name in missing_packages(type(layer.module).forward)}
    if missing and runs_gpu_functions(device):
        kinds = ", ".join(sorted({type(layer.module).__name__ for layer in first}))
        logger.warning(
            "%s run transformers' form in torch, which is correct but slow; for faster kernels install %s",
            kinds,
            ", ".join(sorted(missing)),
        )


def _is_equal(
    layer: RecurrentLayer, form: InnerForm, run: Run, inputs: Sequence[torch.Tensor], random: torch.Generator
) -> bool:
    expected, found = (StateCache(layer.state_shapes, 3, torch.device("cpu")) for _ in range(2))
    for shape in layer.state_shapes:
        key = shape.layer, shape.kind, shape.index
        expected.state(*key).copy_(torch.randn(3, *shape.shape, generator=random))
        found.state(*key).copy_(expected.state(*key))
    wanted = layer.run_inner(expected, run, inputs)
    try:
        result = form(found, layer.module.layer_idx, run, inputs)
    except MISMATCH_ERRORS:
        return False
    states = ((found.state(s.layer, s.kind, s.index), expected.state(s.layer, s.kind, s.index)) for s in found.shapes)
    return is_close(result, wanted) and all(is_close(one, other, wanted.dtype) for one, other in states)
