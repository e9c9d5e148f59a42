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

Models with picture or sound towers are served as language models: prompts are text. Which quantized checkpoints load
is in [quantization.md](quantization.md). RoPE of the kinds `dynamic` and `longrope` is fixed at
`model.max_model_len`, since transformers' own would let a request depend on its neighbours in the batch.

## Mixtures of experts

`parallel.expert_placement` says where experts live. It holds in every mode, so that they never move when the mode
shifts; routers and shared experts are what they are in any layer (whole, and cut like other feed-forward blocks).

| placement | a rank stores | in SP | in TP |
|---|---|---|---|
| `replicate` | 1/tp of every expert's width | own tokens, no exchange | own width, all-reduce |
| `expert` | E/W whole experts | tokens go to the owners, results come back | own experts, all-reduce |
| `width` | 1/W of every expert's width | tokens are gathered, results reduced back | own width, all-reduce |

`auto`, the default, replicates while the weights take at most half of a rank's memory; else it takes `expert`, or
`width` where the number of experts does not divide. In SP, `expert` sends tokens to the owners alone where that saves
enough over gathering them, which is decided from the sizes of the step; in memory shared by the ranks it gathers.

Proved against transformers (`tests/equivalence/test_experts.py`) in all three placements, modes flipped at random, on
2 and 4 ranks in every base layout, with numbers of experts that divide and that do not: mixtral, qwen2_moe, qwen3_moe,
olmoe, deepseek_v2, deepseek_v3, llama4_text, gpt_oss, granitemoe, glm4_moe, ernie4_5_moe, minimax_m2; some of them on 8
ranks, also with fewer experts than ranks. minimax (with lightning attention) and qwen3_next are refused for their
recurrent layers. Experts of longcat_flash stay whole on every rank in any placement.

Weights of one rank of 8, in bfloat16, by `tools/memory_table.py`, which reads the loader's own plan (text model only):

| model | base | `replicate` | `expert`, `width` |
|---|---|---|---|
| Qwen3-30B-A3B | sp8xtp1 | 56.4 GiB | 9.1 GiB |
| Llama-4-Scout-17B-16E | sp4xtp2 | 100.6 GiB | 33.1 GiB |

## Every architecture

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
