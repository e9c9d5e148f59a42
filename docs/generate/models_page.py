"""The support matrix docs/models.md, from the results of the sweep."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ulysses_infer.model.injection.architectures import REFUSED, VERIFIED

HEAD = """# Which models are served

Written by `python -m docs.generate.sweep_architectures` from transformers {version}; do not edit. The sweep takes every
causal language model class of transformers and every class of multimodal models ({total} model types). Of each it makes
a tiny random checkpoint in float32 and runs it on 1, 2 and 4 ranks in the layouts {bases}, with another mode at every
step, chunked prefill, prefix caching and, for mixtures of experts, a random placement per layout. It compares greedy
tokens with `generate` and every log-probability with a plain forward.

- **Yes** ({yes}): tokens equal, log-probabilities within 1e-4. The largest difference seen is given.
- **No** ({no}): the engine refuses it by name, with the reason given, before any weight is loaded. There is never a
  silent wrong answer.
- **Untested** ({untested}): the sweep has no tiny configuration of it that transformers itself runs here. Refused
  unless `model.allow_unverified=true`, and then only served if it passes the checks at start (every layer's attention
  reached once, equal heads in every layer, no mixing of tokens outside of attention).

Which quantized checkpoints load is in [quantization.md](quantization.md). RoPE of the kinds `dynamic` and `longrope` is
fixed at `model.max_model_len`, since transformers' own would let a request depend on its neighbours in the batch.

## Multimodal models

Checkpoints like Llama 4 Scout, Gemma 3 or Qwen3-VL are served as the language models in them: prompts are text, and a
message with an image gets status 400. The multimodal encoders are removed before weights are distributed; their
weights are neither read nor kept.
The rest runs transformers' own forward of the whole model, whose names for the tensors are the
checkpoint's, and is compared with the whole model on text alone. RoPE with sections for time, height and width (mRoPE)
gets one position for all three, as it does in transformers for text, where it is ordinary RoPE.

Wrappers that take any language model (llava, internvl, mistral3, ...) are served around every one that the first table
below serves. Where config.json ties the two embeddings, or leaves that to a default, and the checkpoint has two
different ones, both are used. Refused are models whose layers attend to encoded pictures, that answer nothing without
one, and PaliGemma: its prompts attend in both directions, so that a prompt's first chunk would depend on its last.

## Recurrent and convolutional layers

Models that mix attention with state spaces, linear attention or convolutions (mamba, jamba, bamba, falcon_h1,
granitemoehybrid, nemotron_h, qwen3_next, qwen3_5, minimax, kimi_linear, lfm2, zamba, ...) are refused by name. It could
be done, and this is what it would take:

- *In a mode.* A layer's state is a sum over a sequence in order, for each of its heads alone. Under SP the tokens of a
  sequence lie on several ranks, so the layer would exchange tokens for heads before its scan, as attention does, and
  back after it: after the same all-to-all every rank has all tokens of its own heads, in order, in every mode. The
  state then belongs to the head shard as the KV cache does, and a shift of modes would not move it. The short
  convolution before the scan runs over channels, which cut the same way where they belong to heads.
- *What has no counterpart.* Projections of these layers are packed in an order of each family's own (z, x, B, C, dt),
  with B and C shared by groups of heads that do not divide over as many ranks as the heads do, and norms across all
  channels; each would need its own sharding rule and its own proof. transformers' modules run their scan inside their
  forward, without an interface such as attention and experts have, so each family would need its forward replaced.
- *In the engine.* A state cannot be cut at a block: a prefix is shared only where a copy of the state was kept, chunks
  must hand states on, preemption must save the state or compute all of it again, and the scan would have to run over
  a batch of sequences of different lengths without one's state reaching the next.

The first is sound in this design; the other two are an engine of their own beside the paged cache, and a part of it
only would be served wrong without a sign. So they wait, and the list of names (and, for names not on it, the dry run at
start, which sees a token's neighbours reach it outside of attention) keeps them out.

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
2 and 4 ranks in every base layout and on 8 in one, with numbers of experts that divide and that do not, also fewer than
ranks: mixtral, qwen2_moe, qwen3_moe, olmoe, deepseek_v2, deepseek_v3, llama4_text, gpt_oss, granitemoe, glm4_moe,
ernie4_5_moe, minimax_m2. minimax (with lightning attention) and qwen3_next are refused for their
recurrent layers. Experts of longcat_flash stay whole on every rank in any placement.

Weights of one rank of 8, in bfloat16, by `tools/memory_table.py`, which reads the loader's own plan of the published
configurations (`configs/models`; without Scout's image encoder, which is not kept). `tests/tools/test_memory_table.py`
loads both in a reduced size, in every placement, and finds the plan's bytes, and no more memory taken than them:

| model | base | `replicate` | `expert`, `width` |
|---|---|---|---|
| Qwen3-30B-A3B | sp8xtp1 | 56.4 GiB | 9.1 GiB |
| Llama-4-Scout-17B-16E | sp4xtp2 | 100.6 GiB | 33.1 GiB |
"""
TABLES = {
    "Language models": False,
    "Models with picture or sound towers, text only": True,
}
WORDS = {"yes": "Yes", "untested": "Untested"}


def write_page(results: dict[str, dict[str, Any]], page: Path, bases: str) -> None:
    """Write the matrices, a row a model type."""
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES as MULTIMODAL

    served = {name: WORDS.get(result["outcome"], "No") for name, result in sorted(results.items())}
    text = HEAD.format(
        version=transformers.__version__,
        total=len(results),
        bases=bases,
        **{word.lower(): list(served.values()).count(word) for word in ("Yes", "No", "Untested")},
    )
    for title, with_towers in TABLES.items():
        names = [name for name in served if (name in MULTIMODAL) == with_towers]
        count = sum(served[name] == "Yes" for name in names)
        text += f"\n## {title} ({count} of {len(names)})\n\n| model type | served | |\n|---|---|---|\n"
        text += "".join(f"| {name} | {served[name]} | {_remark(results[name])} |\n" for name in names)
    page.write_text(text)


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
