"""vLLM's build for processors, driven step by step through its offline engine."""

from __future__ import annotations

from typing import Any

from benchmarks.compare_peers.protocol import Answer, Measure, Stopwatch, Task, serve


def start(options: dict[str, Any]) -> tuple[Measure, str]:
    """options: `model`, `dtype`, `tp`, `max_model_len`, `max_num_seqs`."""
    import vllm

    engine = vllm.LLM(
        options["model"],
        dtype=options["dtype"],
        tensor_parallel_size=options["tp"],
        skip_tokenizer_init=True,
        max_model_len=options["max_model_len"],
        max_num_seqs=options["max_num_seqs"],
        enable_prefix_caching=False,
    ).llm_engine

    def measure(task: Task) -> Answer:
        params = vllm.SamplingParams(temperature=0, max_tokens=task["output_len"], ignore_eos=True, detokenize=False)
        tokens: dict[str, list[int]] = {}
        watch = Stopwatch()
        for index, prompt in enumerate(task["prompts"]):
            engine.add_request(str(index), {"prompt_token_ids": prompt}, params)
        while engine.has_unfinished_requests():
            for output in engine.step():
                watch.token()
                tokens[output.request_id] = list(output.outputs[0].token_ids)
        return watch.answer([tokens[str(index)] for index in range(len(task["prompts"]))])

    return measure, vllm.__version__


if __name__ == "__main__":
    serve(start)
