"""The recipe schema: one typed dataclass per section, with the meaning and the values of each key.

The meanings are the text of `docs/recipe-reference.md`; choices and ranges are enforced by `validation.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ulysses_infer.parallel.layout import Layout, Mode

if TYPE_CHECKING:
    ChosenInt = int
else:
    ChosenInt = int | None
    """Null in a recipe; a number for all who read it, since start-up chooses one (`device.py`)."""

MISSING = "???"
"""A value that a recipe must give (OmegaConf's own spelling)."""

DTYPES = ("auto", "bfloat16", "float16", "float32")
CACHE_DTYPES = (*DTYPES, "fp8")


def option(
    default: Any = None,
    *,
    help: str,
    factory: Callable[[], Any] | None = None,
    choices: Sequence[str] | None = None,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    kind: str | None = None,
    secret: bool = False,
) -> Any:
    """A recipe key: its default, its meaning, the values it takes, and whether printing it must hide it.

    `kind` puts the type in words where Python's own says too little.
    """
    metadata = {
        "help": help,
        "kind": kind,
        "choices": choices,
        "at_least": at_least,
        "above": above,
        "at_most": at_most,
        "secret": secret,
    }
    if factory is not None:
        return field(default_factory=factory, metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class ModelConfig:
    """Which checkpoint to serve and how to read it."""

    path: str = option(
        MISSING,
        help="Checkpoint: a hub id, or a folder (a DeepSpeed ZeRO checkpoint's, too), relative to the recipe that "
        "names it or to the working directory.",
    )
    hf_config: str | None = option(
        help="Folder with the Hugging Face config.json (and tokenizer) of a checkpoint that lacks one, as DeepSpeed's "
        "do; null: looked for in the checkpoint and up to three folders above."
    )
    hf_overrides: dict[str, Any] = option(
        factory=dict,
        kind="mapping",
        help="Values of the checkpoint's config.json (of its language model) to replace, as in "
        "`{rope_parameters: {rope_type: yarn, factor: 4.0, original_max_position_embeddings: 32768}}` "
        "(docs/long-context.md).",
    )
    tokenizer: str | None = option(help="Folder or hub id of the tokenizer; null: the checkpoint's own.")
    revision: str | None = option(help="Branch, tag or commit of a hub id; null: its default branch.")
    dtype: str = option("auto", choices=DTYPES, help="Type the weights are kept in; auto: the checkpoint's own.")
    max_model_len: int | None = option(
        at_least=1,
        help="Longest prompt plus output, in tokens; null: what the checkpoint is made for, stretched as its rotary "
        "embedding says. More is served with a warning.",
    )
    trust_remote_code: bool = option(False, help="Run model code that comes with the checkpoint.")
    allow_unverified: bool = option(
        False, help="Serve an architecture that the equivalence tests have not proved right."
    )
    seed: int = option(0, at_least=0, help="Seed of requests that bring none of their own.")


@dataclass
class ParallelConfig:
    """How many ranks form the engine and how they may split a step."""

    sp: int = option(1, at_least=1, help="Token slices of the base mode (Ulysses sequence parallelism).")
    tp: int = option(
        1,
        at_least=1,
        help="Weight slices of the base mode (tensor parallelism); a rank stores 1/tp of the weights.",
    )
    dp: int = option(1, at_least=1, help="Replicas, each of sp * tp ranks, behind one HTTP server; serve only.")
    modes: list[list[int]] | None = option(
        kind="list of [sp, tp]",
        help="Modes to make available beside the base mode; null: full tensor parallelism, [1, sp * tp].",
    )
    rank_order: str = option(
        "sp_inner",
        choices=("sp_inner", "tp_inner"),
        help="Which kind of parallelism neighbouring ranks share; tp_inner for replicas that span nodes.",
    )
    expert_placement: str = option(
        "auto",
        choices=("auto", "replicate", "expert", "width"),
        help="Where the experts of a mixture-of-experts model live, in every mode. replicate: 1/tp of each on every "
        "rank, like other weights; expert: each rank owns its share of the experts; width: each rank owns its share of "
        "every expert; auto: replicate while weights take at most half of a rank's memory, else expert, or width where "
        "the experts do not divide.",
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
        """Who owns what in one replica."""
        return Layout(self.base, self.rank_order)

    @property
    def available_modes(self) -> list[Mode]:
        """The modes a step may run in, the base mode first, none twice."""
        listed = [Mode(1, self.world_size)] if self.modes is None else [Mode(sp, tp) for sp, tp in self.modes]
        return list(dict.fromkeys([self.base, *listed]))


@dataclass
class PolicyConfig:
    """How the mode of a step is chosen."""

    name: str = option(
        "threshold",
        choices=("static", "threshold", "adaptive"),
        help="static: always one mode; threshold: the base mode for large steps, full tensor parallelism for "
        "small ones; adaptive: the mode that is predicted fastest, from step times measured on this machine.",
    )
    mode: Any = option(
        kind="sp | tp | [sp, tp]",
        help="The mode of policy static: sp (the base mode), tp, or [sp, tp]; null: the base mode.",
    )
    threshold_tokens: int = option(
        256, at_least=0, help="Policy threshold: a step with more tokens than this runs in the base mode."
    )
    profile: str | None = option(
        "auto",
        kind="auto | path",
        help="Policy adaptive: measured step times. auto: measured once and kept in the user's cache; a path: what "
        "`ulysses-infer calibrate --output` wrote; null: measured at every start.",
    )
    calibration_seconds: float = option(
        30.0,
        at_least=0,
        help="Policy adaptive: longest time that measuring at start may take; 0: learned from traffic alone.",
    )
    target_tpot_ms: float | None = option(
        above=0,
        help="Policy adaptive: time per output token to keep for requests that decode, by smaller chunks of the "
        "prompts beside them; null: prompts take what the scheduler allows.",
    )
    target_ttft_ms: float | None = option(
        above=0,
        help="Policy adaptive: time to first token to try for, with the time that decodes have in hand under "
        "target_tpot_ms; null: none.",
    )
    exploration: float = option(
        0.0,
        at_least=0,
        at_most=0.5,
        help="Policy adaptive: share of steps run in another mode than the one predicted fastest, to check it.",
    )


@dataclass
class CacheConfig:
    """The paged KV cache of a rank."""

    block_size: int = option(16, at_least=1, help="Tokens per block.")
    dtype: str = option(
        "auto",
        choices=CACHE_DTYPES,
        help="Type of cached keys and values; auto: that of the model. fp8 halves them, with the checkpoint's scales.",
    )
    latent: bool | None = option(
        help="Cache latents instead of the heads they expand to, where attention has them (MLA; docs/latent-cache.md). "
        "null: where that takes less memory a rank."
    )
    memory_utilization: float = option(
        0.92,
        above=0,
        at_most=1,
        help="Share of a device's memory that weights, workspace and cache may take.",
    )
    memory_bytes: int | None = option(
        at_least=1, help="Bytes of cache per rank, instead of what memory_utilization leaves."
    )
    num_blocks: int | None = option(at_least=1, help="Blocks of cache, instead of a number of bytes.")
    enable_prefix_caching: bool = option(True, help="Reuse the blocks of a prompt's beginning seen before.")


@dataclass
class SchedulerConfig:
    """Which requests run in a step."""

    max_num_seqs: int = option(256, at_least=1, help="Most requests in one step.")
    max_num_batched_tokens: ChosenInt = option(
        at_least=1,
        help="Most tokens in one step; null: 8192 on a GPU, 2048 on a CPU, where larger steps are hardly faster and "
        "running streams wait for them.",
    )
    policy: str = option(
        "fcfs",
        choices=("fcfs", "priority"),
        help="Order of waiting requests: arrival, or priority then arrival.",
    )
    enable_chunked_prefill: bool = option(True, help="Split a prompt over several steps, mixed with decodes.")
    async_scheduling: bool | None = option(
        help="Schedule and launch the next step while a short one runs, before its tokens are known; null: on a GPU. "
        "On a CPU, which computes a step at once, tokens would come a step later."
    )


@dataclass
class RuntimeConfig:
    """Devices, backends and diagnosis."""

    device: str = option("auto", choices=("auto", "cpu", "cuda"), help="Where ranks compute; auto: CUDA if present.")
    attention_backend: str = option(
        "auto",
        help="Attention implementation; auto: the best one for the device. On a CPU native or torch; on a GPU "
        "flash_attn, flashinfer (where installed), varlen, flex (torch's own) or torch.",
    )
    collectives: str = option(
        "auto",
        choices=("auto", "torch", "shared_memory"),
        help="How ranks exchange tensors: torch (NCCL, gloo) or memory that they share; auto: the latter on one host "
        "without GPUs.",
    )
    matmul_backend: str = option(
        "auto",
        choices=("auto", "torch", "native"),
        help="Matrix products on a CPU; auto: native where it can be built, for as many rows as it is faster with.",
    )
    fuse: bool = option(
        True,
        help="Compute what lies between the matrix products of a layer in one go, and on a GPU projections of the same "
        "input as one product; each part of a model only if it is proved equal at start (docs/architecture.md).",
    )
    enforce_eager: bool | None = option(
        help="Run every step layer by layer. false: capture decode steps in CUDA graphs, in every mode; null: capture "
        "them on a GPU where attention and model allow it. On a CPU false and null are the same: steps of up to 256 "
        "requests are recorded when they come again, and repeated without Python between the native kernels."
    )
    threads_per_rank: int | None = option(
        at_least=1, help="CPU threads of a rank; null: OMP_NUM_THREADS if set, else its share of the cores."
    )
    pin_cores: bool = option(
        True, help="On a CPU, keep each rank of a host to its own share of the cores, if there are enough for all."
    )
    debug: bool = option(False, help="Verify the digest of every step plan on all ranks.")
    step_timeout: float = option(300.0, above=0, help="Seconds after which a step counts as hung.")
    log_level: str = option(
        "warning", choices=("debug", "info", "warning", "error"), help="Least severe log lines shown."
    )


@dataclass
class ServerConfig:
    """The HTTP server of `serve`."""

    host: str = option("127.0.0.1", help="Address to listen on; 0.0.0.0 for all of the machine's.")
    port: int = option(8000, at_least=0, at_most=65535, help="Port to listen on; 0: any free one.")
    api_key: str | None = option(secret=True, help="Key that clients must send; null: none is asked for.")
    admin_api_key: str | None = option(secret=True, help="Key for the administrative routes; null: routes are off.")
    served_model_name: str | None = option(
        help="Model name that clients use; null: the hub id, or the name of the model's folder."
    )
    chat_template: str | None = option(help="File with the chat template to use instead of the checkpoint's.")
    tool_call_parser: str = option(
        "auto", help="How the model writes tool calls; auto: told from its chat template; none: not parsed."
    )
    max_num_queued_requests: int | None = option(
        1024, at_least=0, help="Requests that may wait for a place; more are turned away with 503. null: any number."
    )
    request_timeout: float | None = option(
        above=0, help="Seconds after which a request that has not ended is ended with an error; null: never."
    )
    stream_interval: int = option(
        1, at_least=1, help="Tokens of each event of a stream after the first: more cost less, and are less smooth."
    )
    max_body_bytes: int = option(32 * 1024 * 1024, at_least=1, help="Largest request body, in bytes.")
    cors_origins: list[str] = option(
        factory=list, help='Web origins whose pages may call the server, as in [https://a.example]; ["*"]: all.'
    )
    ssl_certfile: str | None = option(help="Certificate (PEM) to serve HTTPS with; needs ssl_keyfile too.")
    ssl_keyfile: str | None = option(help="Private key (PEM) of ssl_certfile.")
    access_log: bool = option(False, help="Log every HTTP request, one JSON line each.")
    log_interval: float = option(10.0, above=0, help="Seconds between the log's lines on load and speed.")
    dashboard: bool = option(True, help="Serve the live page /dashboard.")
    shutdown_timeout: float = option(30.0, at_least=0, help="Seconds that running requests get to end at SIGTERM.")
    heartbeat_timeout: float = option(
        4.0, at_least=1, help="Seconds of silence after which a process of the job counts as hung."
    )


@dataclass
class LoraConfig:
    """Adapters that are served beside the model's own weights."""

    adapters: dict[str, str] = option(
        factory=dict,
        kind="mapping of names to paths",
        help="LoRA adapters as PEFT saves them (folders or hub ids) by the name under which requests ask for them. "
        "With any of them runtime.fuse has no effect.",
    )


@dataclass
class GenerateConfig:
    """What `generate` runs."""

    prompts: list[Any] = option(
        factory=list,
        help="Each a text, or a mapping with `prompt` or `messages`, and `sampling` for this prompt alone.",
    )
    sampling: dict[str, Any] = option(factory=dict, help="Sampling parameters of every prompt (`SamplingParams`).")
    adapter: str | None = option(help="LoRA adapter of every prompt, one of lora.adapters; null: none.")
    stream: bool = option(True, help="Print tokens as they come.")
    schedule: list[Any] | None = option(help="Engine step at which each prompt arrives; null: all at once.")
    output: str | None = option(help="File for the results, JSON lines.")


@dataclass
class Config:
    """A whole recipe."""

    model: ModelConfig = field(default_factory=ModelConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    cache: CacheConfig = field(default_factory=CacheConfig)
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)
    server: ServerConfig = field(default_factory=ServerConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    generate: GenerateConfig = field(default_factory=GenerateConfig)

    @property
    def served_model_name(self) -> str:
        """The model name that clients use."""
        local = Path(self.model.path)
        return self.server.served_model_name or (local.resolve().name if local.is_dir() else self.model.path)
