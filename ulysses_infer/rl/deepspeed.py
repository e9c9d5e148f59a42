"""DeepSpeed's rollout contract (`deepspeed.runtime.rollout`): the engine on the ranks of a training job."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.rollout.base import RolloutBatch, RolloutEngine, RolloutRequest, SamplingConfig

from ulysses_infer.errors import RequestError
from ulysses_infer.inference import init_inference
from ulysses_infer.outputs import RequestOutput
from ulysses_infer.sampling_params import SamplingParams

Prompts = list[list[int]]


class UlyssesRollout(RolloutEngine):
    """Generates with one engine on all ranks of the job, in any mode.

    Every rank gives its own prompts and gets their outputs; the prompts of all ranks run together. Ranks of one
    sequence-parallel group give the same prompts and get the same outputs.

    trainer: the `DeepSpeedEngine`. pad_token_id: fills short sequences. config, overrides: as of `init_inference`.
    sleep_level: of `InferenceEngine.sleep` after each generation, to free memory for training; 0: none. With 2,
    `sync_weights` must be called before the next generation.
    """

    name = "ulysses_infer"

    def __init__(
        self, trainer: Any, pad_token_id: int, config: Any = None, sleep_level: int = 0, **overrides: Any
    ) -> None:
        self._trainer, self._pad, self._sleep_level = trainer, pad_token_id, sleep_level
        self._group_size = getattr(trainer, "sequence_parallel_size", None) or 1
        self.engine = init_inference(trainer, config, **overrides)

    def generate(self, request: RolloutRequest, sampling: SamplingConfig) -> RolloutBatch:
        """Complete the prompts of this rank. Collective.

        request.prompt_ids: [B, Tp], padded on the left. Returns sequences [B * n, Tp + Tr], padded on both sides, those
        of one prompt together. Raises `RequestError` if ranks differ in `sampling`.
        """
        own = _unpadded(request)
        prompts, start = self._of_all_ranks(own, sampling)
        self.engine.wake_up()
        outputs = self.engine.generate(prompts, _sampling_params(sampling)) if prompts else []
        if self._sleep_level:
            self.engine.sleep(self._sleep_level)
        return _batch(request, outputs[start : start + len(own)], self._pad)

    def sync_weights(self, step: int) -> None:
        """Take over the trainer's weights. Collective. step: of the training, for logs of the caller."""
        self.engine.update_weights(self._trainer)

    def shutdown(self) -> None:
        """Free the engine's memory; the training goes on."""
        self.engine.shutdown()

    def _of_all_ranks(self, own: Prompts, sampling: SamplingConfig) -> tuple[Prompts, int]:
        """The prompts of the first rank of every sequence-parallel group, and where those of this rank's group start.

        The same on every rank, in rank order.
        """
        given: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(given, (own, repr(sampling)))
        if len({settings for _, settings in given}) > 1:
            raise RequestError("ranks call generate with different SamplingConfigs; give the same on all")
        leaders = given[:: self._group_size]
        sizes = [len(prompts) for prompts, _ in leaders]
        return [prompt for prompts, _ in leaders for prompt in prompts], sum(
            sizes[: dist.get_rank() // self._group_size]
        )


def _unpadded(request: RolloutRequest) -> Prompts:
    rows = zip(request.prompt_ids, request.prompt_attention_mask.bool(), strict=True)
    return [row[mask].tolist() for row, mask in rows]


def _sampling_params(sampling: SamplingConfig) -> SamplingParams:
    return SamplingParams(
        n=sampling.n_samples_per_prompt,
        temperature=max(sampling.temperature, 0.0),
        top_p=sampling.top_p,
        top_k=max(sampling.top_k, 0),
        max_tokens=sampling.max_new_tokens,
        detokenize=False,
    )


def _batch(request: RolloutRequest, outputs: Sequence[RequestOutput], pad: int) -> RolloutBatch:
    """Prompts as they were given, each with one of its outputs."""
    n = len(outputs[0].outputs) if outputs else 1
    prompts = request.prompt_ids.repeat_interleave(n, dim=0)
    masks = request.prompt_attention_mask.repeat_interleave(n, dim=0)
    responses = [torch.tensor(each.token_ids, dtype=prompts.dtype) for output in outputs for each in output.outputs]
    ids = torch.full((len(responses), max(map(len, responses), default=0)), pad, dtype=prompts.dtype)
    present = torch.zeros(ids.shape, dtype=masks.dtype)
    for row, response in enumerate(responses):
        ids[row, : len(response)], present[row, : len(response)] = response, 1
    device = prompts.device
    starts = torch.full((len(responses),), prompts.shape[1], dtype=torch.long, device=device)
    return RolloutBatch(
        torch.cat((prompts, ids.to(device)), dim=1), torch.cat((masks, present.to(device)), dim=1), starts
    )
