"""DeepSpeed's `init_inference` with tensor parallelism, on ranks that its own launcher starts."""

from __future__ import annotations

import datetime
from typing import Any

from benchmarks.compare_peers.protocol import Answer, Measure, Task, serve
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
        buffer.data = frequencies[name].data  # rotary frequencies in bfloat16 are wrong for long positions
    return generating(engine.module)


def follow(options: dict[str, Any]) -> None:
    """Run the tasks that rank 0 broadcasts, on every other rank."""
    from torch import distributed

    measure = load(options)
    while True:
        message: list[Any] = [None]
        distributed.broadcast_object_list(message, src=0)
        if message[0] is None:
            return
        measure(message[0])


def start(options: dict[str, Any]) -> tuple[Measure, str]:
    """Rank 0: broadcast the options and every task to the others."""
    import deepspeed
    from torch import distributed

    distributed.broadcast_object_list([options], src=0)
    measure = load(options)

    def measure_on_all_ranks(task: Task) -> Answer:
        distributed.broadcast_object_list([task], src=0)
        return measure(task)

    return measure_on_all_ranks, deepspeed.__version__


def main() -> None:
    """Join the other ranks; rank 0 serves."""
    import deepspeed
    from torch import distributed

    deepspeed.init_distributed(timeout=FOREVER)
    if distributed.get_rank() == 0:
        try:
            serve(start)
        finally:
            distributed.broadcast_object_list([None], src=0)
    else:
        message: list[Any] = [None]
        distributed.broadcast_object_list(message, src=0)
        follow(message[0])


if __name__ == "__main__":
    main()
