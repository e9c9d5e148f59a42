"""Writes the support matrix, docs/models.md, from the results of the sweep."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from ulysses_infer.model.injection.architectures import REFUSED, VERIFIED

HEAD = """# Supported models

Generated from transformers {version} by `python -m docs.generate.sweep_architectures`; do not edit. The sweep covers
all {total} model types that have a causal or multimodal language model class in transformers. For each type it creates
a tiny random float32 checkpoint and runs it on 1, 2 and 4 ranks in the layouts
{bases}, with a different mode in every step,
chunked prefill, prefix caching and, for mixtures of experts, a random expert placement per layout. It compares greedy
tokens with `generate`, and every log-probability with a plain forward pass.

- **Yes** ({yes}): tokens equal, log-probabilities within 1e-4. The table gives the largest difference.
- **No** ({no}): refused by name, with the reason, before any weight is loaded.
- **Untested** ({untested}): the sweep has no tiny configuration that runs in transformers here. Refused unless
  `model.allow_unverified=true`; even then the model must pass the checks at startup: every layer's attention is reached
  once, all layers have the same heads, and tokens influence each other only through attention.

[quantization.md](quantization.md) lists the supported quantized checkpoints. `dynamic` and `longrope` RoPE frequencies
are computed once, for `model.max_model_len`: in transformers, they depend on the other sequences in the batch.

## Multimodal models

Multimodal checkpoints such as Llama 4 Scout, Gemma 3 or Qwen3-VL are served as text models: a message with an image
gets status 400. The multimodal encoders are removed before weights are distributed; their weights are not read. The
rest runs transformers' forward of the whole model, with the checkpoint's tensor names, and is compared with the whole
model on text. mRoPE (separate positions for time, height and width) gets the same position for all three, which makes
it ordinary RoPE, as in transformers for text.

Wrappers around an arbitrary language model (llava, internvl, mistral3, ...) are served if the first table says Yes for
that language model. If config.json ties the two embeddings, explicitly or by default, but the checkpoint has two
different ones, both are used. Refused: models whose layers attend to encoded images, models that require an image, and
PaliGemma, whose bidirectional attention over the prompt rules out chunked prefill and prefix caching.

## Recurrent and convolutional layers

Models with state-space, linear-attention or convolutional layers (mamba, jamba, bamba, falcon_h1, granitemoehybrid,
nemotron_h, qwen3_next, qwen3_5, minimax, kimi_linear, lfm2, zamba, ...) are refused by name; the dry run at startup
detects other such models, because their tokens influence each other outside attention. Support would require:

- *Modes.* Each head's state is a sum over the sequence in order. Under SP, the layer would exchange tokens for heads
  before its scan and back after it, with the all-to-all that attention uses. The state would belong to the head shard,
  like the KV cache, and survive a change of mode. The short convolution before the scan runs over channels, which can
  be sharded the same way if they belong to heads.
- *Sharding.* Each model family packs the projections of these layers (z, x, B, C, dt) in its own order. B and C are
  shared by groups of heads that do not divide over as many ranks as the heads, and norms span all channels. Each family
  needs its own sharding rule and verification. transformers has no interface for the scan as it has for attention and
  experts, so each family's forward would have to be replaced.
- *Engine.* A state cannot be split into blocks. Prefix caching would need saved copies of states, chunked prefill would
  pass states between chunks, preemption would save or recompute them, and the scan would have to keep sequences of
  different lengths in a batch apart.

The first part fits this design; the other two amount to a second engine beside the paged cache. A partial
implementation would give wrong results silently.

## Mixtures of experts

`parallel.expert_placement` selects where experts are stored. The placement is the same in every mode, so a change of
mode moves no experts. Routers are replicated; shared experts are sharded like other feed-forward blocks.

| placement | stored per rank | in SP | in TP |
|---|---|---|---|
| `replicate` | 1/tp of every expert's width | own tokens, no exchange | own width, all-reduce |
| `expert` | E/W whole experts | tokens go to the owners, results come back | own experts, all-reduce |
| `width` | 1/W of every expert's width | tokens are gathered, results reduced back | own width, all-reduce |

`auto` (the default) selects `replicate` if the weights then take at most half of a rank's memory, else `expert`, or
`width` if the ranks do not divide the number of experts. In SP, `expert` sends tokens only to the owners of their
experts if the estimated saving for the step's sizes is large enough; otherwise, and in shared memory, it gathers all
tokens.

`tests/equivalence/test_experts.py` compares mixtral, qwen2_moe, qwen3_moe, olmoe, deepseek_v2, deepseek_v3,
llama4_text, gpt_oss, granitemoe, glm4_moe, ernie4_5_moe and minimax_m2 with transformers, with changing modes: `expert`
and `width` in every layout of 2 and 4 ranks, `replicate` in sp2xtp2, and each model in one layout of 8 ranks. Expert
counts include some that the ranks do not divide and some below the number of ranks. minimax (with lightning attention)
and qwen3_next are refused for their recurrent layers. Experts of longcat_flash stay whole on every rank in any
placement.

Weights per rank of 8 in bfloat16, from `tools/memory_table.py`, which applies the loader's plan to the published
configurations in `configs/models` (without Scout's image encoder). `tests/tools/test_memory_table.py` loads reduced
versions of both in every placement and checks stored bytes and memory use against the plan:

| model | base | `replicate` | `expert`, `width` |
|---|---|---|---|
| Qwen3-30B-A3B | sp8xtp1 | 56.4 GiB | 9.1 GiB |
| Llama-4-Scout-17B-16E | sp4xtp2 | 100.6 GiB | 33.1 GiB |
"""
TABLES = {
    "Language models": False,
    "Multimodal models, text only": True,
}
MEASURED = "largest difference "
WORDS = {"yes": "Yes", "untested": "Untested"}


def write_page(results: dict[str, dict[str, Any]], page: Path, bases: str) -> None:
    """Write the page, with one table row per model type."""
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES as MULTIMODAL

    served = {name: WORDS.get(result["outcome"], "No") for name, result in sorted(results.items())}
    text = HEAD.format(
        version=transformers.__version__,
        total=len(results),
        bases=bases,
        **{word.lower(): list(served.values()).count(word) for word in ("Yes", "No", "Untested")},
    )
    for title, multimodal in TABLES.items():
        names = [name for name in served if (name in MULTIMODAL) == multimodal]
        count = sum(served[name] == "Yes" for name in names)
        text += f"\n## {title} ({count} of {len(names)})\n\n| model type | served | |\n|---|---|---|\n"
        text += "".join(f"| {name} | {served[name]} | {_remark(results[name])} |\n" for name in names)
    page.write_text(text)


def read_page(page: Path) -> dict[str, dict[str, Any]]:
    """The results that `write_page` wrote, for model types that were not run again."""
    rows = re.findall(r"^\| (\S+) \| (Yes|No|Untested) \| (.*) \|$", page.read_text(), flags=re.MULTILINE)
    outcomes = {"Yes": "yes", "No": "refused", "Untested": "untested"}
    return {
        name: {"outcome": outcomes[word], "detail": detail.removeprefix(MEASURED).replace("\\|", "|")}
        for name, word, detail in rows
    }


def changed(results: dict[str, dict[str, Any]]) -> set[str]:
    """Model types whose results contradict `VERIFIED` or `REFUSED`."""
    proved = {name for name, result in results.items() if result["outcome"] == "yes"}
    reasons = {name for name, reason in REFUSED.items() if results.get(name, {}).get("detail") != reason}
    return (proved ^ VERIFIED) | reasons


def _remark(result: dict[str, Any]) -> str:
    detail = str(result["detail"]).partition(" (known: ")[0].replace("|", "\\|")
    _, found, reason = detail.partition(" is not supported: ")
    return f"{MEASURED}{detail}" if result["outcome"] == "yes" else (reason if found else detail)


def differences(results: dict[str, dict[str, Any]]) -> list[str]:
    """Differences between VERIFIED and REFUSED and the results of the sweep, one per line."""
    proved = {name for name, result in results.items() if result["outcome"] == "yes"}
    wrong = {name for name, result in results.items() if result["outcome"] in ("wrong", "error")}
    found = {
        "proved, but not in VERIFIED": proved - VERIFIED,
        "in VERIFIED, but not proved": VERIFIED - proved,
        "wrong or failing, but not in REFUSED": wrong - REFUSED.keys(),
    }
    return [f"{what}: {' '.join(sorted(names))}" for what, names in found.items() if names]
