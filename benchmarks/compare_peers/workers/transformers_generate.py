"""transformers' own `generate`: one process, prompts of equal length as one static batch."""

from __future__ import annotations

from typing import Any

from benchmarks.compare_peers.protocol import Answer, Measure, Stopwatch, Task, serve


class FirstToken:
    """A streamer: `generate` passes it the prompt, then each token."""

    def __init__(self, watch: Stopwatch) -> None:
        self._watch, self._calls = watch, 0

    def put(self, value: Any) -> None:
        """Receive the prompt, or one more token."""
        self._calls += 1
        if self._calls > 1:
            self._watch.token()

    def end(self) -> None:
        """End of the output."""


def generating(model: Any) -> Measure:
    """The measuring function of a model that has transformers' `generate`."""
    import torch

    def measure(task: Task) -> Answer:
        prompts, length = torch.tensor(task["prompts"]), task["output_len"]
        watch = Stopwatch()
        streamer = FirstToken(watch) if len(prompts) == 1 else None  # streamers take single requests only
        with torch.inference_mode():
            output = model.generate(
                prompts,
                attention_mask=torch.ones_like(prompts),
                max_new_tokens=length,
                min_new_tokens=length,
                do_sample=False,
                streamer=streamer,
                pad_token_id=0,
            )
        return watch.answer(output[:, prompts.shape[1] :].tolist())

    return measure


def start(options: dict[str, Any]) -> tuple[Measure, str]:
    """options: `model`, `dtype`, `threads`."""
    import torch
    import transformers

    torch.set_num_threads(options["threads"])
    model = transformers.AutoModelForCausalLM.from_pretrained(options["model"], dtype=options["dtype"])
    return generating(model.eval()), transformers.__version__


if __name__ == "__main__":
    serve(start)
