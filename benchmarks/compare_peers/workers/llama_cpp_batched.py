"""llama.cpp through its Python binding's low-level calls: prompts in batches of `n_batch` tokens, then all decode."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

from benchmarks.compare_peers.protocol import Answer, Measure, Stopwatch, Task, serve
from benchmarks.compare_peers.workers.gguf_file import write

BATCH = 2048  # tokens of one call, llama.cpp's own default


class Context:
    """A loaded model and its cache for several sequences; greedy tokens only."""

    def __init__(self, path: Path, options: dict[str, Any]) -> None:
        import llama_cpp

        self._api = llama_cpp
        llama_cpp.llama_backend_init()
        self._model = llama_cpp.llama_model_load_from_file(str(path).encode(), llama_cpp.llama_model_default_params())
        settings = llama_cpp.llama_context_default_params()
        settings.n_ctx = options["max_model_len"] * options["max_num_seqs"]
        settings.n_seq_max = options["max_num_seqs"]
        settings.n_batch = BATCH
        settings.n_threads = settings.n_threads_batch = options["threads"]
        if options["dtype"] == "float32":  # else its own default for the cache, float16
            settings.type_k = settings.type_v = llama_cpp.GGML_TYPE_F32
        self._context = llama_cpp.llama_init_from_model(self._model, settings)
        if not self._model or not self._context:
            raise RuntimeError(f"llama.cpp could not load {path}; its log says why")
        self._num_tokens = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))
        self._batch = llama_cpp.llama_batch_init(BATCH, 0, 1)

    def clear(self) -> None:
        """Forget all sequences."""
        self._api.llama_memory_clear(self._api.llama_get_memory(self._context), False)

    def run(self, entries: list[tuple[int, int, int, bool]]) -> list[int]:
        """Compute (token, position, sequence, wanted) and give the next token after every wanted one."""
        import numpy as np

        found: list[int] = []
        for start in range(0, len(entries), BATCH):
            chunk = entries[start : start + BATCH]
            self._batch.n_tokens = len(chunk)
            for place, (token, position, sequence, wanted) in enumerate(chunk):
                self._batch.token[place], self._batch.pos[place] = token, position
                self._batch.n_seq_id[place], self._batch.seq_id[place][0] = 1, sequence
                self._batch.logits[place] = wanted
            status = self._api.llama_decode(self._context, self._batch)
            if status:
                raise RuntimeError(f"llama_decode returned {status}")
            for place, entry in enumerate(chunk):
                if entry[3]:
                    row = self._api.llama_get_logits_ith(self._context, place)
                    address = ctypes.cast(row, ctypes.POINTER(ctypes.c_float))
                    found.append(int(np.ctypeslib.as_array(address, (self._num_tokens,)).argmax()))
        return found


def start(options: dict[str, Any]) -> tuple[Measure, str]:
    """options: `model`, `dtype`, `threads`, `max_model_len`, `max_num_seqs`, `folder` (for the GGUF file)."""
    import llama_cpp

    source = Path(options["model"])
    path = Path(options["folder"]) / f"{source.name}-{options['dtype']}.gguf"
    if not path.is_file() or path.stat().st_mtime < (source / "model.safetensors").stat().st_mtime:
        write(source, path, options["dtype"])
    context = Context(path, options)

    def measure(task: Task) -> Answer:
        prompts: list[list[int]] = task["prompts"]
        watch = Stopwatch()
        context.clear()
        entries = [
            (token, position, sequence, position == len(prompt) - 1)
            for sequence, prompt in enumerate(prompts)
            for position, token in enumerate(prompt)
        ]
        tokens = [[token] for token in context.run(entries)]
        watch.token()
        for turn in range(task["output_len"] - 1):
            step = [(tokens[i][-1], len(prompt) + turn, i, True) for i, prompt in enumerate(prompts)]
            for sequence, token in enumerate(context.run(step)):
                tokens[sequence].append(token)
        return watch.answer(tokens)

    return measure, llama_cpp.__version__


if __name__ == "__main__":
    serve(start)
