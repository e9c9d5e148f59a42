"""A tiny DeepSpeed training on the ranks of a pool: ZeRO 0 to 3 and Ulysses SP over all ranks, as users set it up."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F

from tests.equivalence.tiny_models import perturb
from tests.tiny import SHAPE, tiny_config

STEPS = 20
ROWS, LENGTH = 2, 32
IGNORED = -100


class Training:
    """One rank's part: `engine` is DeepSpeed's, `step` trains on one random batch, `logprobs` is its own forward."""

    def __init__(
        self,
        stage: int,
        sequence_parallel: int,
        dtype: str = "fp32",
        lora: dict[str, Any] | None = None,
        frozen: bool = False,
        config: Any = None,
        **changes: Any,
    ) -> None:
        """config: of the model to train instead of the tiny Llama."""
        import deepspeed
        import deepspeed.comm as comm
        from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF
        from transformers import AutoModelForCausalLM

        self.rank, self.sp = comm.get_rank() % sequence_parallel, sequence_parallel
        torch.manual_seed(0)
        if config is None:
            config = tiny_config(attn_implementation="sdpa", **changes)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        perturb(model)
        mpu = None
        if sequence_parallel > 1:
            mpu = UlyssesSPAttentionHF.register_with_transformers(
                model, "sdpa", sequence_parallel, micro_batch_size=ROWS, seq_length_is_variable=True
            )
        if lora is not None:
            model = with_adapters(model, lora)
        if frozen:
            freeze_some(model)
        settings = {
            "train_micro_batch_size_per_gpu": ROWS,
            "gradient_clipping": 1.0,
            "sequence_parallel_size": sequence_parallel,
            "bf16": {"enabled": dtype == "bf16"},
            # A low threshold, so that ZeRO 3 really partitions the matrices of so small a model.
            "zero_optimization": {
                "stage": stage,
                "reduce_scatter": stage < 3,
                "stage3_param_persistence_threshold": 64,
            },
            "steps_per_print": 10**9,
        }
        trained = [p for p in model.parameters() if p.requires_grad]
        groups = [[p for p in trained if p.dim() > 1], [p for p in trained if p.dim() == 1]] if frozen else [trained]
        optimizer = torch.optim.AdamW([{"params": group} for group in groups], lr=1e-2)
        self.engine: Any = deepspeed.initialize(model=model, optimizer=optimizer, mpu=mpu, config=settings)[0]
        self._random = torch.Generator().manual_seed(1)

    def step(self) -> None:
        """One optimizer step on random tokens: every parameter moves."""
        tokens = torch.randint(3, SHAPE["vocab_size"], (ROWS, LENGTH), generator=self._random)
        labels = F.pad(tokens, (0, 1), value=IGNORED)[:, 1:]
        logits = self._logits(tokens)
        loss = F.cross_entropy(
            logits.flatten(0, 1), self._mine(labels).flatten(), ignore_index=IGNORED, reduction="sum"
        )
        self.engine.backward(loss / (labels != IGNORED).sum())
        self.engine.step()

    def logprobs(self, token_ids: list[int]) -> list[float]:
        """By the training's own forward, on all ranks together: the log-probability of each token but the first."""
        scores = self._scores(token_ids)[:-1]
        found: list[float] = scores.gather(1, torch.tensor(token_ids[1:])[:, None])[:, 0].tolist()
        return found

    def complete(self, prompt: list[int], count: int) -> list[int]:
        """By the training's own forward, on all ranks together: `prompt` and the `count` likeliest tokens after it."""
        tokens = list(prompt)
        for _ in range(count):
            tokens.append(int(self._scores(tokens)[-1].argmax()))
        return tokens

    @torch.no_grad()
    def weights(self) -> dict[str, torch.Tensor]:
        """Copies of the module's own parameters, whole, by name."""
        from deepspeed.runtime.zero import GatheredParameters

        parameters = dict(self.engine.module.named_parameters())
        with GatheredParameters(list(parameters.values()), enabled=self.engine.zero_optimization_partition_weights()):
            return {name: parameter.detach().clone() for name, parameter in parameters.items()}

    @torch.no_grad()
    def _scores(self, token_ids: list[int]) -> torch.Tensor:
        """[n, V] log-probabilities of what follows each of n tokens."""
        import deepspeed.comm as comm

        count = len(token_ids)
        length = -(-count // self.sp) * self.sp
        tokens = torch.tensor([[*token_ids, *[0] * (length - count)]] * ROWS)
        logits = self._logits(tokens)[0].float().contiguous()
        slices = [torch.empty_like(logits) for _ in range(self.sp)]
        if self.sp > 1:
            comm.all_gather(slices, logits, group=self.engine.seq_parallel_group)
        else:
            slices = [logits]
        return torch.cat(slices)[:count].log_softmax(-1)

    def _logits(self, tokens: torch.Tensor) -> torch.Tensor:
        """tokens: [ROWS, n]; logits of this rank's slice of them, [ROWS, n / sp, V]."""
        positions = torch.arange(tokens.shape[1]).expand_as(tokens)
        logits: torch.Tensor = self.engine(
            input_ids=self._mine(tokens), position_ids=self._mine(positions), use_cache=False
        ).logits
        return logits

    def _mine(self, rows: torch.Tensor) -> torch.Tensor:
        return rows.chunk(self.sp, dim=1)[self.rank]


def freeze_some(model: Any) -> None:
    """Freeze a layer's matrices and some norms."""
    for name, parameter in model.named_parameters():
        if "layers.0.mlp" in name or "input_layernorm" in name:
            parameter.requires_grad = False


def with_adapters(model: Any, lora: dict[str, Any]) -> Any:
    """The model with random adapters of PEFT's on it, the only ones that train."""
    import peft

    kind = peft.VeraConfig if lora.get("peft_type") == "VERA" else peft.LoraConfig
    defaults = {"init_lora_weights": False, "r": 4, "lora_alpha": 6} if kind is peft.LoraConfig else {}
    return peft.get_peft_model(model, kind(**{**defaults, **lora}))


@contextmanager
def training(stage: int, sequence_parallel: int, **changes: Any) -> Iterator[Training]:
    """A `Training` on every rank; afterwards nothing of it is left in the process."""
    from deepspeed.runtime.sequence_parallel import parallel_state_sp
    from deepspeed.utils import groups
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    original = ALL_ATTENTION_FUNCTIONS["sdpa"]  # Ulysses replaces it
    trained = Training(stage, sequence_parallel, **changes)
    try:
        yield trained
    finally:
        trained.engine.destroy()
        parallel_state_sp._release_sequence_parallel_groups()
        groups.mpu = None
        ALL_ATTENTION_FUNCTIONS["sdpa"] = original
