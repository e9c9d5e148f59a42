"""This engine, through its public interface."""

from __future__ import annotations

from typing import Any

from benchmarks.compare_peers.protocol import Answer, Measure, Stopwatch, Task, serve

FOREVER = 1e6  # seconds: a process that is stopped while others are measured is not hung


def start(options: dict[str, Any]) -> tuple[Measure, str]:
    """options: `model`, `dtype`, `sp`, `threads` (of a rank), `max_model_len`, `num_blocks`, `overrides` (of keys)."""
    import ulysses_infer
    from ulysses_infer import SamplingParams, init_inference

    settings = {
        "model.dtype": options["dtype"],
        "model.max_model_len": options["max_model_len"],
        "parallel.sp": options["sp"],
        "cache.num_blocks": options["num_blocks"],
        "cache.enable_prefix_caching": False,
        "runtime.threads_per_rank": options["threads"],
        "runtime.step_timeout": FOREVER,
        **options["overrides"],
    }
    engine = init_inference(options["model"], **settings)
    current: dict[str, Any] = {}

    def measure(task: Task) -> Answer:
        nonlocal current
        policy = task.get("policy", current)
        if policy != current:
            engine.set_policy(**policy)
            current = policy
        params = SamplingParams(temperature=0, max_tokens=task["output_len"], ignore_eos=True, detokenize=False)
        watch = Stopwatch()
        outputs = engine.generate(task["prompts"], params, on_step=lambda touched: watch.token() if touched else None)
        return watch.answer([list(output.outputs[0].token_ids) for output in outputs])

    return measure, ulysses_infer.__version__


if __name__ == "__main__":
    serve(start)
