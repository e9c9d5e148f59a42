"""The recipe schema: one typed dataclass per section, with the description and the allowed values of each key.

The descriptions are the text of `docs/recipe-reference.md`; `validation.py` enforces choices and ranges.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ulysses_infer.arithmetic import round_up
from ulysses_infer.config.option import MISSING, option
from ulysses_infer.config.policy import PolicyConfig
from ulysses_infer.config.ray import RayConfig
from ulysses_infer.config.server import ServerConfig
from ulysses_infer.config.speculation import QUANTIZE, SpeculationConfig
from ulysses_infer.parallel.layout import Layout, Mode

if TYPE_CHECKING:
    ChosenInt = int
else:
    ChosenInt = int | None
    """May be null in a recipe; `device.py` replaces null by a number at start, before anything reads it."""

DTYPES = ("auto", "bfloat16", "float16", "float32")
CACHE_DTYPES = (*DTYPES, "fp8")
SNAPSHOT_INTERVAL = 512  # tokens, unless the recipe sets it


@dataclass
class ModelConfig:
    """Which checkpoint to serve and how to read it."""

    path: str = option(
        MISSING,
        help="Checkpoint: a hub id, a folder (DeepSpeed ZeRO checkpoints included) or a GGUF file, relative to the "
        "recipe that contains the key or to the working directory.",
    )
    hf_config: str | None = option(
        help="Folder with the Hugging Face config.json (and tokenizer) for a checkpoint without one, such as a "
        "DeepSpeed checkpoint; null: search the checkpoint and up to three folders above it."
    )
    hf_overrides: dict[str, Any] = option(
        factory=dict,
        kind="mapping",
        help="Values that replace those in the checkpoint's config.json (of its language model), as in "
        "`{rope_parameters: {rope_type: yarn, factor: 4.0, original_max_position_embeddings: 32768}}` "
        "(docs/long-context.md).",
    )
    tokenizer: str | None = option(help="Folder or hub id of the tokenizer; null: the checkpoint's own.")
    revision: str | None = option(help="Branch, tag or commit of a hub id; null: the default branch.")
    dtype: str = option("auto", choices=DTYPES, help="Data type of the weights; auto: the checkpoint's.")
    quantize: str | None = option(
        choices=QUANTIZE,
        help="Quantise linear layers and experts while loading a checkpoint that is not quantised. int8: "
        "one scale per output; int4: a scale and a zero point per group of inputs; null: keep them as they are "
        "(docs/quantization.md).",
    )
    quantize_group_size: int = option(
        32,
        at_least=32,
        at_most=128,
        help="Inputs per scale of `model.quantize: int4`: 32, 64 or 128. Smaller groups are more accurate and larger.",
    )
    quantize_head: bool = option(
        True,
        help="With `model.quantize`: also store the vocabulary head in int8, one scale per token, which halves what "
        "each decode step reads of it. A head that is tied to the input embedding becomes a copy.",
    )
    max_model_len: int | None = option(
        at_least=1,
        help="Maximum length of prompt plus output, in tokens; null: what the checkpoint supports, RoPE scaling "
        "included (except dynamic). A higher value gives a warning.",
    )
    generation_config: str = option(
        "auto",
        kind="auto, none or a folder",
        help="Sampling defaults of requests (temperature, top_p, top_k, min_p, repetition_penalty, max_new_tokens). "
        "auto: those of the checkpoint's generation_config.json; none: neutral values; or the folder of another one.",
    )
    override_generation_config: dict[str, Any] = option(
        factory=dict, kind="mapping", help="Sampling defaults to set or replace, as in `{temperature: 0.6}`."
    )
    trust_remote_code: bool = option(False, help="Run model code that comes with the checkpoint.")
    allow_unverified: bool = option(
        False, help="Serve an architecture that has not been verified against transformers (docs/models.md)."
    )
    seed: int | None = option(
        at_least=0,
        help="Makes a run repeatable: seeds of requests that have none of their own are derived from it, different "
        "ones per replica; null: such requests get random seeds.",
    )


@dataclass
class ParallelConfig:
    """How many ranks form the engine and how they may split a step."""

    sp: int = option(1, at_least=1, help="Sequence-parallel size of the base mode (Ulysses).")
    tp: int = option(
        1,
        at_least=1,
        help="Tensor-parallel size of the base mode; a rank stores 1/tp of the weights.",
    )
    dp: int = option(1, at_least=1, help="Replicas, each of sp * tp ranks, behind one HTTP server; serve only.")
    modes: list[list[int]] | None = option(
        kind="list of [sp, tp]",
        help="Modes available in addition to the base mode; null: full tensor parallelism, [1, sp * tp].",
    )
    rank_order: str = option(
        "sp_inner",
        choices=("sp_inner", "tp_inner"),
        help="Whether neighbouring ranks form sequence-parallel or tensor-parallel groups; use tp_inner for replicas "
        "that span nodes.",
    )
    pad_heads: str = option(
        "auto",
        choices=("auto", "never"),
        help="Attention heads that do not divide over the ranks, such as 28 query and 4 KV heads on 8: auto pads them "
        "during attention (weights stay unpadded), and the start logs what that costs; never refuses them.",
    )
    expert_placement: str = option(
        "auto",
        choices=("auto", "replicate", "expert", "width"),
        help="Placement of the experts of a mixture-of-experts model, in every mode. replicate: 1/tp of each on every "
        "rank, like other weights; expert: each rank stores some of the experts; width: each rank stores a slice of "
        "every expert; auto: replicate if weights take at most half of a rank's memory, else expert, or width if the "
        "ranks do not divide the number of experts.",
    )

    @property
    def base(self) -> Mode:
        """The mode the weights are loaded for."""
        return Mode(self.sp, self.tp)

    @property
    def world_size(self) -> int:
        """Ranks of one replica."""
        return self.sp * self.tp

    @property
    def num_ranks(self) -> int:
        """Ranks of the job: those of all replicas."""
        return self.dp * self.world_size

    @property
    def layout(self) -> Layout:
        """The placement of heads on the ranks of one replica."""
        return Layout(self.base, self.rank_order, self.pad_heads == "auto")

    @property
    def available_modes(self) -> list[Mode]:
        """The modes a step may run in: the base mode first, without duplicates."""
        listed = [Mode(1, self.world_size)] if self.modes is None else [Mode(sp, tp) for sp, tp in self.modes]
        return list(dict.fromkeys([self.base, *listed]))


@dataclass
class CacheConfig:
    """The paged KV cache of a rank."""

    block_size: int = option(16, at_least=1, help="Tokens per block.")
    dtype: str = option(
        "auto",
        choices=CACHE_DTYPES,
        help="Data type of cached keys and values; auto: the model's. fp8 halves their size and uses the checkpoint's "
        "scales.",
    )
    latent: bool | None = option(
        help="Cache latents instead of the heads they expand to, for models with MLA (docs/latent-cache.md); "
        "null: if that takes less memory per rank."
    )
    memory_utilization: float = option(
        0.92,
        above=0,
        at_most=1,
        help="Share of device memory for weights, workspace and cache.",
    )
    memory_bytes: int | None = option(
        at_least=1, help="Cache size per rank in bytes, instead of what memory_utilization leaves."
    )
    num_blocks: int | None = option(at_least=1, help="Cache size in blocks, instead of bytes.")
    enable_prefix_caching: bool = option(True, help="Reuse cached blocks for prompts with a common prefix.")
    state_snapshots: int | None = option(
        at_least=0,
        help="Recurrent layers: number of saved states that prompts with a common prefix can start from; null: up to "
        "four per request of scheduler.max_num_seqs, in at most 1/8 of the cache; 0: none, and no prefix is reused.",
    )
    state_snapshot_interval: int | None = option(
        at_least=1,
        help="Recurrent layers: tokens between snapshots of a text, a multiple of cache.block_size; null: 512 or the "
        "next multiple. Steps of a prompt end at such positions, and where it leaves another cached text.",
    )
    offload_host_bytes: int = option(
        0,
        at_least=0,
        help="Bytes of host memory per rank for blocks of the prefix cache that were evicted (docs/serving.md). "
        "0: they are lost.",
    )
    offload_disk_bytes: int = option(
        0,
        at_least=0,
        help="Bytes of disk space per rank for blocks that host memory has no more room for; 0: they are lost.",
    )
    offload_disk_folder: str | None = option(
        help="Folder on a fast local disk for cache.offload_disk_bytes. The files have no name and end with the engine."
    )

    @property
    def snapshot_interval(self) -> int:
        """Tokens between snapshots of a text."""
        return self.state_snapshot_interval or round_up(SNAPSHOT_INTERVAL, self.block_size)


@dataclass
class SchedulerConfig:
    """Which requests run in a step."""

    max_num_seqs: int = option(256, at_least=1, help="Maximum number of requests in one step.")
    max_num_batched_tokens: ChosenInt = option(
        at_least=1,
        help="Maximum number of tokens in one step; null: 8192 on a GPU, 2048 on a CPU, where larger steps are hardly "
        "faster and delay running streams.",
    )
    policy: str = option(
        "fcfs",
        choices=("fcfs", "priority"),
        help="Order of waiting requests: by arrival, or by priority and then arrival.",
    )
    enable_chunked_prefill: bool = option(True, help="Split a prompt over several steps, mixed with decodes.")
    async_scheduling: bool | None = option(
        help="Schedule and launch the next step while a short step runs, before its tokens are known; null: only on a "
        "GPU. A CPU computes steps synchronously, so this would only delay tokens by one step."
    )


@dataclass
class RuntimeConfig:
    """Devices, backends and diagnostics."""

    device: str = option("auto", choices=("auto", "cpu", "cuda"), help="Where ranks compute; auto: CUDA if present.")
    attention_backend: str = option(
        "auto",
        help="Attention implementation; auto: the best one for the device. On a CPU native or torch; on a GPU "
        "flash_attn, flashinfer (where installed), triton (our own kernel) or torch (slow).",
    )
    collectives: str = option(
        "auto",
        choices=("auto", "torch", "shared_memory", "symmetric_memory"),
        help="How ranks exchange tensors: torch (NCCL, gloo), shared memory (CPUs of one host) or symmetric memory for "
        "small messages (GPUs of one host); auto: whichever memory the ranks can share, else torch.",
    )
    matmul_backend: str = option(
        "auto",
        choices=("auto", "torch", "native"),
        help="Matrix products on a CPU; auto: native where it can be built, up to the number of rows for which it is "
        "faster than torch.",
    )
    fuse: bool = option(
        True,
        help="Fuse the operations between the matrix products of a layer, and on a GPU the projections of the same "
        "input; each part of a model only if a check at start finds equal results (docs/architecture.md).",
    )
    enforce_eager: bool | None = option(
        help="Run every step layer by layer. false: capture decode steps as CUDA graphs, in every mode; null: capture "
        "them on a GPU if attention and model allow it. On a CPU, false and null both record decode steps of "
        "up to 256 requests as CPU graphs when they recur, and replay them without Python between the native kernels."
    )
    max_captured_tokens: int = option(
        1024,
        at_least=0,
        help="The largest step with prompt tokens that is captured as a CUDA graph, in tokens; 0 captures decode steps "
        "only. Needs Triton's attention (runtime.attention_backend). On a CPU, such steps are recorded from 32 tokens "
        "per slice up to this limit, at most 512.",
    )
    logprobs_mode: str = option(
        "raw_logprobs",
        choices=("raw_logprobs", "processed_logprobs"),
        help="Log-probabilities of output tokens. raw_logprobs: the model's; processed_logprobs: those that the token "
        "was drawn with, after logits processors, temperature, min_p, top_k and top_p.",
    )
    threads_per_rank: int | None = option(
        at_least=1, help="CPU threads per rank; null: its share of the cores, at most OMP_NUM_THREADS."
    )
    pin_cores: bool = option(
        True, help="On a CPU, pin each rank to its own share of the host's cores, if there are enough for all ranks."
    )
    profile_folder: str | None = option(
        help="Folder for traces of torch's profiler, one file per rank (/start_profile, /stop_profile); null: none can "
        "be recorded."
    )
    debug: bool = option(False, help="Verify the digest of every step plan on all ranks.")
    step_timeout: float = option(300.0, above=0, help="Seconds after which a step is considered hung.")
    log_level: str = option(
        "warning", choices=("debug", "info", "warning", "error"), help="Minimum severity of log lines."
    )


@dataclass
class LoraConfig:
    """Adapters served in addition to the model's own weights."""

    adapters: dict[str, str] = option(
        factory=dict,
        kind="mapping of names to paths",
        help="LoRA adapters in PEFT's format (folders or hub ids), by the name that requests use. With any adapter, "
        "runtime.fuse has no effect.",
    )
    runtime_bytes: int = option(
        0,
        at_least=0,
        help="Bytes on each rank for adapters that are loaded while serving (/v1/load_lora_adapter); 0: none can be.",
    )

    @property
    def is_used(self) -> bool:
        """Whether any adapter is or may be loaded."""
        return bool(self.adapters or self.runtime_bytes)


@dataclass
class GenerateConfig:
    """The prompts and options of `generate`."""

    prompts: list[Any] = option(
        factory=list,
        help="Each is a text, or a mapping with `prompt` or `messages`, and `sampling` for this prompt only.",
    )
    sampling: dict[str, Any] = option(factory=dict, help="Sampling parameters of every prompt (`SamplingParams`).")
    adapter: str | None = option(help="LoRA adapter of every prompt, one of lora.adapters; null: none.")
    stream: bool = option(True, help="Print tokens as they are generated.")
    schedule: list[Any] | None = option(help="Engine step at which each prompt arrives; null: all at once.")
    output: str | None = option(help="File for the results, as JSON lines.")


@dataclass
class Config:
    """A whole recipe."""

    model: ModelConfig = field(default_factory=ModelConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    speculation: SpeculationConfig = field(default_factory=SpeculationConfig)
    cache: CacheConfig = field(default_factory=CacheConfig)
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)
    server: ServerConfig = field(default_factory=ServerConfig)
    ray: RayConfig = field(default_factory=RayConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    generate: GenerateConfig = field(default_factory=GenerateConfig)

    @property
    def served_model_name(self) -> str:
        """The model name that clients use."""
        local = Path(self.model.path).resolve()
        own = local.stem if local.is_file() else local.name if local.is_dir() else self.model.path
        return self.server.served_model_name or own
