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
  `model.allow_unverified=true`; even then the model must pass the checks at startup: attention is reached once in every
  layer that has it, with the heads that its config says, and tokens influence each other only through attention and
  recurrent states.

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
different ones, both are used. Refused: models that require an image, Idefics and Evolla, whose layers attend to encoded
images, and PaliGemma, whose bidirectional attention over the prompt rules out chunked prefill and prefix caching.

## Models that transformers lacks

`ulysses_infer/model/definitions` defines them on transformers' classes, under the names of their checkpoints.

*SwiftKV* (`LlamaSwiftKVForCausalLM`, arXiv 2410.03960; Snowflake/Llama-3.1-SwiftKV-8B-Instruct and relatives): keys and
values of the layers after `num_key_value_layers` come from the output of that layer, through `norm_swiftkv`. So all
tokens run through the first layers, and only those whose logits are needed (decodes, drafted tokens, the last token of
a prompt) through the others; chunks of a prompt that need no logits skip them. `key_value_group_size` layers may share
keys and values; they are cached once. With `prompt_logprobs`, all tokens run through all layers. Refused:
`kv_sharing_map`, another way to share keys that no published checkpoint has, and speculation by heads (`mtp`,
`eagle3`), which read hidden states of all tokens.

- *Modes.* Keys and values of later layers go to the cache by the all-to-all, for all tokens. The tokens that go on are
  gathered over the SP group once and divided evenly again, so that no rank has more than its share of them.
- *Products.* A prompt of 4096 tokens takes 48% fewer in Llama-3.1-SwiftKV-8B than in Llama-3.1-8B, counted on device
  `meta` (`tests/equivalence/test_swiftkv.py`, with a quarter of the layers).
- *Graphs.* Decodes are recorded on a CPU and captured on a GPU. Steps with prompt tokens are not captured: which tokens
  go on differs from step to step. They run layer by layer, and skip.

The same test compares them with a plain forward written from the paper, in every mode on 1, 2 and 4 ranks, quantised,
with adapters and with drafted tokens.

## Attention of other kinds

Most models call attention through transformers' attention interface, where the engine puts its own function. The
adapters in `ulysses_infer/model/adapters` do the rest for families whose modules compute attention themselves, pack
their projections in an order of their own, or count positions from the batch. The weights keep their names.

- *ALiBi* (Bloom, MPT, some Falcons): the slopes are sliced by head shard and stay in float32, in every attention back
  end but flashinfer, which derives slopes from the number of heads; on a GPU, the other back ends are chosen instead.
  transformers rounds Falcon's biases to bfloat16, so its log-probabilities differ from these by that rounding unless
  slopes are powers of two and positions are below 256, as in the sweep.
- *Encoders as decoders* (BERT and its descendants): checkpoints with `is_decoder: true`. The positions of RoBERTa's
  descendants start behind the padding token, as in transformers' forward; its `generate` starts at 0.
- *Decoders alone* (BART and its relatives): checkpoints with `is_encoder_decoder: false`, as the ForCausalLM classes
  save them. Cross-attention is removed.
- *Speech pipelines* (Qwen-Omni): the thinker is served, from the checkpoint of the whole pipeline.
- *Llama 3.2 Vision*: without an image, transformers skips the layers that attend to one. They are removed.
- *Logits of relative positions* (Inkling): each query adds to its scores a value per head and distance, up to
  `rel_extent` tokens back. It is the product of the query's relative state, which the all-to-all carries with the
  query, and a matrix of the layer. The torch, C and Triton back ends add it, as well as sinks that differ per token
  (Inkling 2); flashinfer and flash_attn are not chosen. Rows of the head that are no tokens (`unpadded_vocab_size`) are
  not loaded. Inkling with encoders needs the package `scipy`, as in transformers, although the encoders are removed.
- *Differential attention* (DiffLlama) needs the two heads of a pair on one rank: ranks must divide half the KV heads.
- JetMoE's experts, DBRX's, the shared experts of Inkling, the gates of RWKV's feed-forward blocks, Zaya's projections
  to values, and the feed-forward blocks of encoders are whole on every rank.

## Heads that do not divide over the ranks

Any number of query and KV heads runs on any number of ranks (`parallel.pad_heads: auto`, the default; `never` refuses
what does not divide and names the numbers of ranks that fit). Ranks get consecutive query heads, as equal in number as
possible. For the all-to-all and attention, each is padded to the same number of KV heads and of query heads per KV
head (`parallel/head_layout.py`). Among all layouts this takes the fewest KV heads per rank, because they determine how
many tokens the cache holds, and then the fewest query heads. Padding repeats a head that the rank has anyway, and its
output is dropped, so results do not change. Weights contain no padding: a rank stores the rows of its own heads, as
views of the checkpoint where it can, of any quantized format. A rank without a head of its own (3 heads on 4 ranks)
computes a neighbour's and adds zero. In full tensor parallelism nothing is padded unless a rank's KV heads have
different numbers of query heads. The start logs what padding costs:

| model | query, KV heads | ranks | per rank | attention | KV cache | all-to-all |
|---|---|---|---|---|---|---|
| Qwen2.5-7B | 28, 4 | 8 | 4, 1 | +14% | +0% | +11% |
| SmolLM2-135M | 9, 3 | 2 | 6, 2 | +33% | +33% | +33% |
| Qwen2.5-0.5B | 14, 2 | 4 | 4, 1 | +14% | +0% | +11% |
| Falcon-7B | 71, 1 | 8 | 9, 1 | +1% | +0% | +1% |

`tests/equivalence/test_padded_heads.py` compares these four with transformers, and models with packed projections,
norms over all heads, sinks, biases per head, latents and fewer heads than ranks.

## Learned sparse attention

In DeepSeek-V3.2, GLM-MoE-DSA, A.X-K2, Hunyuan-V4, Mistral-Large-4, dots3-note, GLM-5-Next and Qwen4-Exp, layers have
an *index*: small heads score all earlier tokens for each token, which attends to the best `index_topk` of them. The
index runs transformers' own code up to the scores, which are computed where its keys are cached
(`model/layers/key_index.py`, `attention/index.py`, `kernels/index.py`). Layers that share
a selection (GLM, Hunyuan, Mistral) share it here, too.

- *Cache.* Index keys lie in the blocks of the latents, in the model's dtype even if the cache is FP8. All heads of an
  index see one key per token, so every rank holds the keys of all tokens: the same in every mode.
- *Modes.* A rank scores keys for the tokens of its slice, with all index heads, so the selection does not depend on how
  attention heads are sharded. Ranks of a TP group compute the same from the same inputs. Under SP, two all-gathers per
  index exchange the step's keys and the selected slots.
- *Ties.* Of keys with equal scores the earlier are selected; transformers selects any of them.
- *Attention.* To a back end, each token is a sequence of its own in blocks of one slot. On a GPU, Triton kernels score
  and select, and are captured in CUDA graphs; flashinfer and flash_attn, which are planned on the host, are not used.
  On a CPU, torch scores and selects, and decode steps are not recorded.
- *Pools* (`index_kpool` of GLM-5-Next, `indexer_compress_ratio` of Qwen4-Exp): one index key for several consecutive
  tokens. A token attends to all tokens of the best pools, and to those after the last complete one. Blocks hold what
  the index projects of each token; the key of a complete pool takes the place of its last token's projection, so that
  scores read one key per pool, and prefixes may end within a pool (`model/layers/pooled_keys.py`). Refused:
  `index_kpool_always_select_tail: false`, which leaves the first tokens of a text without anything to attend to.
- *Short sequences.* Attention is dense if no sequence of a step is longer than `index_topk`. Captured steps select
  unless `model.max_model_len` is that short.

DeepSeek-V3.2 in FP8 on 8 H200 (`python -m tools.cache_table configs/models/deepseek-v3.2.json`, without weights): each
rank stores 93.2 GiB of weights. Of 83.9 KiB of cache per token, index keys take 15.3 KiB; the heads of a rank would
take 610 KiB.

| tokens of a request | its cache on a rank | of heads | requests that fit | of heads |
|---|---|---|---|---|
| 8,192 | 0.66 GiB | 4.77 GiB | 49 | 6 |
| 32,768 | 2.62 GiB | 19.06 GiB | 12 | 1 |
| 131,072 | 10.48 GiB | 76.25 GiB | 3 | 0 |

`tests/equivalence/test_selected_keys.py` compares these models with transformers, with 8 of up to 54 keys selected, and
DeepSeek-V3.2 with its real heads, experts and index heads on 8 ranks. DeepSeek-V4 is refused: it attends to entries
that are compressed from windows of tokens.

## Layers that differ

Layers may have different numbers and widths of key/value heads, or read the keys and values of another layer. Each
layer has its own head plan and its own shape in the cache (`ulysses_infer/cache/paged.py`); layers with the same
attention span share a block table, whatever their shapes.

- *Gemma 4* (31B, 26B-A4B): global layers have fewer and wider heads than those with windows, and one projection for
  keys and values. *MiMo-V2-Flash*: layers with windows have twice as many key/value heads; values are narrower than
  keys.
- *Gemma 3n, Gemma 4 E2B and E4B*: the last layers attend to the keys and values of an earlier one. They cache nothing,
  and under SP they exchange only queries. The embeddings of the per-layer inputs are whole on every rank
  (`embed_tokens_per_layer`, 4.4 GiB in Gemma 3n E4B; the start says how much), and so are AltUp and LAuReL, which are
  small.
- *Activation sparsity* (Gemma 3n): the cutoff depends on mean and deviation of all neurons of a token. Under TP the
  ranks merge theirs in one all-reduce of two numbers per token and rank.
- *Gemma 3n* with encoders needs the package `timm`, as in transformers, although the encoders are removed.

Gemma 4 31B on 8 H200 in sp8xtp1, in bfloat16, by the loader's own budget (`python -m tools.cache_table`): 57.2 GiB of
weights per rank leave 68.8 GiB for the cache. Of each token, the 10 global layers keep 20 KiB per rank; all 60 layers
take 120 KiB within the window of 1024, which full attention would take for every token:

| tokens of a request | its cache per rank | with full attention | requests that fit | with full attention |
|---|---|---|---|---|
| 8,192 | 0.255 GiB | 0.938 GiB | 269 | 73 |
| 32,768 | 0.724 GiB | 3.750 GiB | 95 | 18 |
| 131,072 | 2.599 GiB | 15.000 GiB | 26 | 4 |
| 262,144 | 5.099 GiB | 30.000 GiB | 13 | 2 |

## Recurrent and convolutional layers

Layers with a recurrent state (Mamba, gated delta rules, lightning attention, short convolutions) run transformers' own
code, each rank for its heads or channels of all tokens: an all-to-all precedes the layer's inner part and another
follows it, as in attention. The state of a sequence belongs to the head shard, so that it is the same in every mode. It
is held in slots beside the blocks of the KV cache (`ulysses_infer/model/recurrent`, `cache.state_snapshots` in
[recipe-reference.md](recipe-reference.md)). The dry run at startup refuses models whose tokens influence each other in
another way.

Heads, groups and channels must divide over the ranks (key heads and groups may be fewer than ranks: neighbours share
them); otherwise the start refuses the layout and lists those that fit. Quantised projections, LoRA adapters of
projections, new weights and models that DeepSpeed trains with ZeRO work as for other layers
(`tests/equivalence/test_recurrent_features.py`, `tests/training/test_recurrent_rollouts.py`).

*On CPUs* the inner part runs in C for gated delta nets, Kimi delta attention, Mamba 2, lightning attention and short
convolutions, in float32 and bfloat16, if widths are multiples of 16 and a check at start finds transformers' results
and states. Decodes are then recorded (of models with MLA only with `cache.latent=false`, because the C attention takes
no latents). Other kinds (Mamba 1, RG-LRU and more) run in torch. `python -m benchmarks.measure_recurrent`, one thread
of a Zen 4 processor, bfloat16, least CPU time in milliseconds, on a busy machine:

| layer | sequences x tokens | transformers | in C | ratio |
|---|---|---|---|---|
| gated delta net, 8 heads of 128 x 128 | 1 x 1 | 0.964 | 0.145 | 6.7 |
| | 8 x 1 | 11.8 | 0.976 | 12 |
| | 1 x 512 | 56.5 | 8.88 | 6.4 |
| Kimi delta attention, 8 heads of 128 x 128 | 1 x 1 | 0.788 | 0.150 | 5.2 |
| | 8 x 1 | 13.4 | 0.959 | 14 |
| | 1 x 512 | 697 | 9.28 | 75 |
| Mamba 2, 16 heads of 64 x 128 | 1 x 1 | 1.39 | 0.164 | 8.5 |
| | 8 x 1 | 7.12 | 0.774 | 9.2 |
| | 1 x 512 | 67.8 | 6.38 | 11 |
| short convolution, 1024 channels | 1 x 1 | 0.182 | 0.043 | 4.2 |
| | 8 x 1 | 0.270 | 0.117 | 2.3 |
| | 1 x 512 | 3.88 | 0.727 | 5.3 |

*On GPUs* the layers call the kernels of flash-linear-attention, causal-conv1d and mamba-ssm if these are installed, as
transformers does, and transformers' functions in torch if not; rank 0 then says once what to install. On other devices
the torch functions run even if the packages are installed. Sequences of equal lengths run together; packed sequences
(`cu_seqlens`) are not used, because the convolution kernels cannot both pack sequences and continue their states.
Signatures are checked against the packages' sources (`tests/model/recurrent/test_gpu_functions.py`); no GPU has run it.

Inkling, Inkling 2, Zaya and RWKV read the tokens before a token in other places (`model/recurrent/history.py`):

- *In attention.* Keys and values are convolved, and Zaya's queries, too. That follows the all-to-all, where a rank has
  all tokens of its heads. It keeps the last ones of each sequence as a state. Zaya's heads must divide over the ranks,
  except for KV heads that several ranks have.
- *In the residual stream.* Inkling convolves the outputs of attention and feed-forward; RWKV mixes each token with the
  one before it. A rank has the tokens of its slice, with all channels. In SP, ranks exchange the ends of slices and
  sequences, as many tokens as the convolution looks back; in TP, they exchange nothing. Every rank keeps the state of
  all channels, in the model's dtype.

`tests/equivalence/test_convolved_streams.py` compares them with transformers.

Qwen4-Exp adds *embeddings of n-grams* to some layers' residual streams (PLE), by hashes of the last tokens and with a
short convolution. A rank owns n-gram heads, which are ranges of rows of the table, and channels of the convolution
(`model/recurrent/ngram.py`). It looks up all tokens in its rows, in every mode, reads no other rows from the
checkpoint, and keeps the last token ids in its states.

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
counts include some that the ranks do not divide and some below the number of ranks. Experts of longcat_flash stay whole
on every rank in any placement.

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
