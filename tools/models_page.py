"""The support matrix docs/models.md, from the results of the sweep."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ulysses_infer.model.architectures import REFUSED, VERIFIED

HEAD = """# Which models are served

Written by `python -m tools.sweep_architectures` from transformers {version}: do not edit. The sweep takes every causal
language model class of transformers ({total} model types), makes a tiny random checkpoint of it in float32, runs it
through the engine on 1, 2 and 4 ranks in the layouts {bases}
with another mode at every step, chunked prefill and prefix caching, and compares greedy tokens with `generate` and
every log-probability with a plain forward.

- **Yes** ({yes}): tokens equal, log-probabilities within 1e-4. The largest difference seen is given.
- **No** ({no}): the engine refuses it by name, with the reason given; never a silent wrong answer.
- **Untested** ({untested}): the sweep has no tiny configuration of it that transformers itself runs here. Refused
  unless `model.allow_unverified=true`, and then only served if it passes the checks at start (every layer's attention
  reached once, equal heads in every layer, no mixing of tokens outside of attention).

Models with picture or sound towers are served as language models: prompts are text. Quantized checkpoints are refused
until their issue lands. RoPE of the kinds `dynamic` and `longrope` is fixed at `model.max_model_len`, since
transformers' own would let a request depend on its neighbours in the batch.

| model type | served | |
|---|---|---|
"""
WORDS = {"yes": "Yes", "untested": "Untested"}


def write_page(results: dict[str, dict[str, Any]], page: Path, bases: str) -> None:
    """Write the matrix, a row a model type."""
    import transformers

    served = {name: WORDS.get(result["outcome"], "No") for name, result in sorted(results.items())}
    counts = {word: list(served.values()).count(word) for word in ("Yes", "No", "Untested")}
    head = HEAD.format(
        version=transformers.__version__, total=len(results), bases=bases, yes=counts["Yes"], no=counts["No"],
        untested=counts["Untested"],
    )  # fmt: skip
    rows = [f"| {name} | {served[name]} | {_remark(results[name])} |" for name in served]
    page.write_text(head + "\n".join(rows) + "\n")


def _remark(result: dict[str, Any]) -> str:
    detail = str(result["detail"]).partition(" (known: ")[0].replace("|", "\\|")
    _, found, reason = detail.partition(" is not supported: ")
    return f"largest difference {detail}" if result["outcome"] == "yes" else (reason if found else detail)


def differences(results: dict[str, dict[str, Any]]) -> list[str]:
    """What the allow-list and the deny-list say otherwise than the sweep, a line each."""
    proved = {name for name, result in results.items() if result["outcome"] == "yes"}
    wrong = {name for name, result in results.items() if result["outcome"] in ("wrong", "error")}
    found = {
        "proved, but not in VERIFIED": proved - VERIFIED,
        "in VERIFIED, but not proved": VERIFIED - proved,
        "wrong or failing, but not in REFUSED": wrong - REFUSED.keys(),
    }
    return [f"{what}: {' '.join(sorted(names))}" for what, names in found.items() if names]
