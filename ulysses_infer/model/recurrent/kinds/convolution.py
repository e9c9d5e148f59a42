"""Rules of short convolutions (LFM)."""

from __future__ import annotations

from typing import Any

from ulysses_infer.model.recurrent.native.convolution import NativeShortConvolution
from ulysses_infer.model.recurrent.rules import Input, Rule, convolution
from ulysses_infer.parallel.sharding import Part, Sharding


def short_convolution(module: Any) -> Rule:
    """LFM: B, C and x one after another, all per channel."""
    channels = Part(module.conv.in_channels)
    return Rule(
        inputs=(Input("in_proj", Sharding((channels, channels, channels))),),
        output="out_proj",
        output_part=channels,
        weights=convolution("conv", Sharding((channels,))),
        units={"channels": (channels.units, False)},
        native=lambda own, dtype, _: NativeShortConvolution.of(own, dtype),
    )
