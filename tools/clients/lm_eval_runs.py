"""The package `lm_eval`: `local-completions` and `local-chat-completions`, on tasks made of Python's library."""

from __future__ import annotations

import math
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

from tools.clients.checking import Check, Results, Server, error_of, main
from tools.run_lm_eval import TASKS, evaluate, write_tasks

DOCUMENTS = 4
CHAT_TASKS = [name for name, text in TASKS.items() if "generate_until" in text]


def program(server: Server, results: Results) -> None:
    """Both kinds of models; each task is a check."""
    with tempfile.TemporaryDirectory() as folder:
        write_tasks(Path(folder), DOCUMENTS)
        for kind, path, tasks in (
            ("local-completions", "completions", list(TASKS)),
            ("local-chat-completions", "chat/completions", CHAT_TASKS),
        ):
            for task in tasks:
                check: Check = partial(run, folder=folder, kind=kind, path=path, task=task)
                results.write(f"{kind}: {task}", error_of(check, server))


def run(server: Server, folder: str, kind: str, path: str, task: str) -> None:
    """Raises `AssertionError` unless every metric of the task is a finite number."""
    arguments = (
        f"model={server.model},base_url={server.url}/v1/{path},num_concurrent=4,max_retries=1,max_length=1024,"
        f"tokenizer={server.tokenizer},tokenizer_backend=huggingface,tokenized_requests={kind == 'local-completions'}"
    )
    more: dict[str, Any] = {"apply_chat_template": True} if "chat" in kind else {}
    metrics = evaluate(folder, kind, arguments, [task], **more)[task]
    assert metrics, "no metrics"
    assert all(math.isfinite(value) for value in metrics.values()), metrics


if __name__ == "__main__":
    main(program)
