"""DeepSpeed's `init_inference` with tensor parallelism, on ranks that its own launcher starts."""

from __future__ import annotations

import datetime
from typing import Any

from benchmarks.compare_peers.asking import Answer, Measure, Task, serve
from benchmarks.compare_peers.workers.transformers_generate import generating

FOREVER = datetime.timedelta(days=7)  # ranks wait for each other while others are measured


def load(options: dict[str, Any]) -> Measure:
    """The model on all ranks; collective. options: `model`, `dtype`, `tp`, `threads` (of a rank)."""
    import deepspeed
    import torch
    import transformers

    torch.set_num_threads(options["threads"])
    dtype = getattr(torch, options["dtype"])
    model = transformers.AutoModelForCausalLM.from_pretrained(options["model"], dtype=dtype).eval()
    frequencies = {name: buffer.clone() for name, buffer in model.named_buffers()}
    tensor_parallel = {"tp_size": options["tp"]}
    engine = deepspeed.init_inference(model, dtype=dtype, tensor_parallel=tensor_parallel)
    for name, buffer in engine.module.named_buffers():
        buffer.data = frequencies[name].data  # rotary frequencies in bfloat16 would get long positions wrong
    return generating(engine.module)


def follow(options: dict[str, Any]) -> None:
    """What every rank but the first does: the same tasks, told by the first."""
    from torch import distributed

    measure = load(options)
    while True:
        told: list[Any] = [None]
        distributed.broadcast_object_list(told, src=0)
        if told[0] is None:
            return
        measure(told[0])


def start(options: dict[str, Any]) -> tuple[Measure, str]:
    """The first rank's part: the others are told the options, and every task."""
    import deepspeed
    from torch import distributed

    distributed.broadcast_object_list([options], src=0)
    measure = load(options)

    def together(task: Task) -> Answer:
        distributed.broadcast_object_list([task], src=0)
        return measure(task)

    return together, deepspeed.__version__


def main() -> None:
    """Join the other ranks; the first one serves."""
    import deepspeed
    from torch import distributed

    deepspeed.init_distributed(timeout=FOREVER)
    if distributed.get_rank() == 0:
        try:
            serve(start)
        finally:
            distributed.broadcast_object_list([None], src=0)
    else:
        told: list[Any] = [None]
        distributed.broadcast_object_list(told, src=0)
        follow(told[0])


if __name__ == "__main__":
    main()
