"""The recipe's section `policy`: how the mode of a step is chosen."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ulysses_infer.config.option import option


@dataclass
class PolicyConfig:
    """How the mode of a step is chosen."""

    name: str = option(
        "threshold",
        choices=("static", "threshold", "adaptive"),
        help="static: always one mode; threshold: the base mode for large steps, full tensor parallelism for "
        "small ones; adaptive: the mode predicted to be fastest, from step times measured on this machine.",
    )
    mode: Any = option(
        kind="sp | tp | [sp, tp]",
        help="The mode of policy static: sp (the base mode), tp, or [sp, tp]; null: the base mode.",
    )
    threshold_tokens: int = option(
        256, at_least=0, help="Policy threshold: steps with more tokens than this run in the base mode."
    )
    profile: str | None = option(
        "auto",
        kind="auto | path",
        help="Policy adaptive: measured step times. auto: measure once and store them in the user's cache folder; a "
        "path: a file written by `ulysses-infer calibrate --output`; null: measure at every start.",
    )
    calibration_seconds: float = option(
        30.0,
        at_least=0,
        help="Policy adaptive: maximum duration of the calibration at start; 0: learn from traffic only.",
    )
    target_tpot_ms: float | None = option(
        above=0,
        help="Policy adaptive: target time per output token. Prompts are prefilled in smaller chunks so that decoding "
        "requests meet it; null: the scheduler alone limits chunks.",
    )
    target_ttft_ms: float | None = option(
        above=0,
        help="Policy adaptive: target time to first token. A prompt that would miss it gets larger chunks while "
        "the mean time per token of every decoding request stays within target_tpot_ms; null: none.",
    )
    exploration: float = option(
        0.0,
        at_least=0,
        at_most=0.5,
        help="Policy adaptive: share of steps that run in a mode other than the one predicted to be fastest, to check "
        "its prediction.",
    )
