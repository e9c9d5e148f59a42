"""llama.cpp, or its fork ik_llama.cpp, through low-level calls: prompts in batches of `n_batch` tokens, then tokens."""

from __future__ import annotations

import ctypes
import importlib
import subprocess
from pathlib import Path
from typing import Any

from benchmarks.compare_peers.protocol import Answer, Measure, Stopwatch, Task, serve
from benchmarks.compare_peers.workers.gguf_file import write

BATCH = 2048  # tokens of one call, llama.cpp's own default
FILE_TYPES = {"q4_0": 2, "q8_0": 7, "q4_k": 14}  # llama.h: LLAMA_FTYPE_MOSTLY_Q4_0, Q8_0, Q4_K_S
QUANTISE_SECONDS = 600


class Context:
    """A loaded model and its cache for several sequences; greedy tokens only."""

    def __init__(self, api: Any, path: Path, options: dict[str, Any]) -> None:
        self._api = api
        api.llama_backend_init()
        self._model = api.llama_model_load_from_file(str(path).encode(), api.llama_model_default_params())
        settings = api.llama_context_default_params()
        settings.n_ctx = options["max_model_len"] * options["max_num_seqs"]
        settings.n_seq_max = options["max_num_seqs"]
        settings.n_batch = BATCH
        settings.n_threads = settings.n_threads_batch = options["threads"]
        if options["dtype"] == "float32":  # else its own default for the cache, float16
            settings.type_k = settings.type_v = 0  # ggml.h: GGML_TYPE_F32
        if hasattr(settings, "flash_attn"):  # the fork's fails an assertion on batches of several sequences
            settings.flash_attn = False
        self._context = api.llama_init_from_model(self._model, settings) if self._model else None
        if not self._context:
            raise RuntimeError(f"llama.cpp could not load {path}; its log says why")
        self._num_tokens = api.llama_vocab_n_tokens(api.llama_model_get_vocab(self._model))
        self._batch = api.llama_batch_init(BATCH, 0, 1)

    def clear(self) -> None:
        """Forget all sequences."""
        if hasattr(self._api, "llama_kv_cache_clear"):  # the fork's
            self._api.llama_kv_cache_clear(self._context)
        else:
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


def model_file(api: Any, options: dict[str, Any]) -> Path:
    """The GGUF file of the model with the weights of `options`, written if it is missing or older than the model."""
    source, folder = Path(options["model"]), Path(options["folder"])
    path = folder / f"{source.name}-{options['dtype']}.gguf"
    if not path.is_file() or path.stat().st_mtime < (source / "model.safetensors").stat().st_mtime:
        write(source, path, options["dtype"])
    if not options["weights"]:
        return path
    quantised = path.with_name(f"{path.stem}-{options['weights']}.gguf")
    if not quantised.is_file() or quantised.stat().st_mtime < path.stat().st_mtime:
        unfinished = quantised.with_suffix(".unfinished")
        quantise(api, path, unfinished, options)
        unfinished.rename(quantised)
    return quantised


def quantise(api: Any, path: Path, target: Path, options: dict[str, Any]) -> None:
    """Write `target` in another type, with the engine's own quantisation. Raises `RuntimeError`."""
    if hasattr(api, "llama_model_quantize"):
        settings = api.llama_model_quantize_default_params()
        settings.ftype, settings.nthread = FILE_TYPES[options["weights"]], options["threads"]
        status = api.llama_model_quantize(str(path).encode(), str(target).encode(), ctypes.byref(settings))
    else:  # the fork's binding has it as a program
        tool = Path(api.__file__).parent / "bin" / "llama-quantize"
        kind = {"q4_k": "Q4_K_S"}.get(options["weights"], options["weights"].upper())
        command = [str(tool), str(path), str(target), kind, str(options["threads"])]
        status = subprocess.run(command, check=False, timeout=QUANTISE_SECONDS).returncode
    if status:
        raise RuntimeError(f"{path} could not be quantised to {options['weights']}: status {status}")


def start(options: dict[str, Any]) -> tuple[Measure, str]:
    """options: `binding` (the module with llama.h's functions), `model`, `dtype`, `weights` ("": as they are),
    `threads`, `max_model_len`, `max_num_seqs`, `folder` (for the GGUF files)."""
    api = importlib.import_module(options["binding"])
    package = importlib.import_module(options["binding"].partition(".")[0])
    context = Context(api, model_file(api, options), options)

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

    return measure, str(getattr(package, "__version__", "unknown"))


if __name__ == "__main__":
    serve(start)
