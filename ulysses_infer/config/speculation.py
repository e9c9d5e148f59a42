"""The recipe's section on speculative decoding."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ulysses_infer.config.option import option

METHODS = ("none", "ngram", "suffix", "draft_model", "mtp", "eagle3")
DRAFT_MODEL, EAGLE3 = "draft_model", "eagle3"
HEADS = ("mtp", EAGLE3)
"""Methods whose drafts come from the hidden states of the served model."""
AUTO = "auto"
QUANTIZE = ("int8", "int4")
MOST_AUTOMATIC = 16  # drafted tokens of a request per step, if their number is chosen automatically
MOST_OF_HEADS = 4  # the same for heads, whose drafts get worse with each token


@dataclass
class SpeculationConfig:
    """Speculative decoding: several tokens of a request per step (docs/speculation.md)."""

    method: str = option(
        "none",
        choices=METHODS,
        help="What proposes tokens for a step to verify. ngram: what followed the latest earlier occurrence of a "
        "request's last tokens in its own text; suffix: what followed most often, in its own text and in recent "
        "outputs; draft_model: what a smaller model of the same vocabulary would output; mtp: what the "
        "checkpoint's own multi-token-prediction module predicts from the model's hidden states; eagle3: what an "
        "EAGLE-3 head predicts from them; none: every step gives a request one token.",
    )
    model: str | None = option(
        help="Method draft_model: the checkpoint that drafts, as in `model.path`. Its vocabulary must be that of the "
        "served model. Method eagle3: the checkpoint of the head, which must have been trained for the served model."
    )
    draft_ranks: str = option(
        "all",
        choices=("all", "first"),
        help="Method draft_model: which ranks hold the draft model. all: it is split over them as the served model is; "
        "first: rank 0 holds it whole and drafts alone, without exchanges.",
    )
    quantize: str | None = option(
        choices=QUANTIZE,
        help="Method draft_model: quantise the draft model while loading it, as `model.quantize` does. So a model can "
        "draft for itself: most of what its quantised weights predict is right.",
    )
    num_tokens: Any = option(
        AUTO,
        kind="auto | int",
        help="Drafted tokens of a request per step. auto: up to 16, as many as give the most tokens per second by the "
        "predicted step times and by how many of the request's drafted tokens were accepted so far, 0 included; a "
        "number: always that many, if so many are proposed.",
    )
    min_match: int = option(
        2, at_least=2, help="Fewest last tokens of a text that must have occurred before, for a proposal."
    )
    max_match: int = option(
        32, at_least=2, help="Most last tokens that are compared: of two earlier occurrences, the longer one counts."
    )
    share_outputs: bool = option(
        True,
        help="Method suffix: propose from recent outputs of other requests too, of the same cache_salt and adapter.",
    )
    max_shared_tokens: int = option(
        200_000, at_least=1, help="Method suffix: recent output tokens kept for proposals, per cache_salt and adapter."
    )
    acceptance: str = option(
        "exact",
        choices=("exact", "rejection"),
        help="exact: a drafted token is accepted if it is the one that the step without speculation would sample, so a "
        "seed gives the same tokens with and without speculation; rejection: rejection sampling, with the same "
        "distribution of outputs but other tokens.",
    )
    max_batched_tokens: int | None = option(
        at_least=1,
        help="Largest step that drafted tokens may enlarge, in tokens; larger steps have none. null: no limit but "
        "scheduler.max_num_batched_tokens.",
    )

    @property
    def is_enabled(self) -> bool:
        """Whether anything is drafted."""
        return self.method != METHODS[0]

    @property
    def max_drafted(self) -> int:
        """The most drafted tokens of a request per step."""
        if not self.is_enabled:
            return 0
        if self.num_tokens != AUTO:
            return int(self.num_tokens)
        return MOST_OF_HEADS if self.method in HEADS else MOST_AUTOMATIC
