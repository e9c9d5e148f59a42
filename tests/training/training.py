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

    def __init__(self, stage: int, sequence_parallel: int, dtype: str = "fp32", **changes: Any) -> None:
        import deepspeed
        import deepspeed.comm as comm
        from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF
        from transformers import AutoModelForCausalLM

        self.rank, self.sp = comm.get_rank() % sequence_parallel, sequence_parallel
        torch.manual_seed(0)
        config = tiny_config(attn_implementation="sdpa", **changes)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        perturb(model)
        mpu = UlyssesSPAttentionHF.register_with_transformers(
            model, "sdpa", sequence_parallel_size=sequence_parallel, micro_batch_size=ROWS, seq_length_is_variable=True
        )
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
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
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

    @torch.no_grad()
    def logprobs(self, token_ids: list[int]) -> list[float]:
        """By the training's own forward, on all ranks together: the log-probability of each token but the first."""
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
        scores = torch.cat(slices)[: count - 1].log_softmax(-1)
        found: list[float] = scores.gather(1, torch.tensor(token_ids[1:])[:, None])[:, 0].tolist()
        return found

    def _logits(self, tokens: torch.Tensor) -> torch.Tensor:
        """tokens: [ROWS, n]; logits of this rank's slice of them, [ROWS, n / sp, V]."""
        positions = torch.arange(tokens.shape[1]).expand_as(tokens)
        logits: torch.Tensor = self.engine(
            input_ids=self._mine(tokens), position_ids=self._mine(positions), use_cache=False
        ).logits
        return logits

    def _mine(self, rows: torch.Tensor) -> torch.Tensor:
        return rows.chunk(self.sp, dim=1)[self.rank]


@contextmanager
def training(stage: int, sequence_parallel: int, **changes: Any) -> Iterator[Training]:
    """A `Training` on every rank; afterwards nothing of it is left in the process."""
    from deepspeed.runtime.sequence_parallel import parallel_state_sp
    from deepspeed.utils import groups
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    original = ALL_ATTENTION_FUNCTIONS["sdpa"]  # Ulysses puts itself in its place
    trained = Training(stage, sequence_parallel, **changes)
    try:
        yield trained
    finally:
        trained.engine.destroy()
        parallel_state_sp._release_sequence_parallel_groups()
        groups.mpu = None
        ALL_ATTENTION_FUNCTIONS["sdpa"] = original
