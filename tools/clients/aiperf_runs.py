"""The package `aiperf`: a short load on each of the endpoints that it knows and the server has."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

from tools.clients.checking import Check, Results, Server, equal, error_of, main

REQUESTS, OUTPUT_TOKENS = 6, 8
STREAMED = ("chat", "completions", "responses", "messages")
COUNTED = ("chat", "completions")
"""Where outputs have the length asked for, and are counted: messages may end earlier, and for responses it takes usage
from `response.completed` only, while those that were cut at their limit end otherwise."""
ENDPOINTS = (*STREAMED, "embeddings", "cohere-rankings")
NO_FOLDERS = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
"""With these set it takes a tokenizer's folder for the name of a repository; without them it reads the folder."""


def program(server: Server, results: Results) -> None:
    """Each endpoint is a check."""
    for endpoint in ENDPOINTS:
        check: Check = partial(run, endpoint=endpoint)
        results.write(f"{endpoint}{' streamed' if endpoint in STREAMED else ''}", error_of(check, server))


def run(server: Server, endpoint: str) -> None:
    """Raises `AssertionError` unless all requests were answered, streams with the number of tokens asked for."""
    is_streamed = endpoint in STREAMED
    with tempfile.TemporaryDirectory() as folder:
        options = {
            "model": server.model,
            "url": server.url,
            "endpoint-type": endpoint,
            "tokenizer": server.tokenizer,
            "request-count": REQUESTS,
            "concurrency": 2,
            "workers-max": 1,
            "prompt-input-tokens-mean": 24,
            "output-artifact-dir": folder,
            "ui": "none",
        }
        if is_streamed:
            options |= {"prompt-output-tokens-mean": OUTPUT_TOKENS}
        command = [str(Path(sys.executable).with_name("aiperf")), "profile", "--no-gpu-telemetry"]
        command += [word for name, value in options.items() for word in (f"--{name}", str(value))]
        command += ["--streaming", "--use-server-token-count", "--extra-inputs", "ignore_eos:true"] * is_streamed
        variables = {name: value for name, value in os.environ.items() if name not in NO_FOLDERS}
        subprocess.run(command, env=variables, check=False)
        summary = json.loads((Path(folder) / "profile_export_aiperf.json").read_text("utf-8"))
        check_summary(summary, endpoint in COUNTED)


def check_summary(summary: dict[str, Any], is_counted: bool) -> None:
    """Raises `AssertionError` if requests failed, or outputs that are counted were too short."""
    equal(summary.get("error_summary") or [], [])
    equal(summary["request_count"]["avg"], REQUESTS)
    if is_counted:
        equal(summary["output_sequence_length"]["avg"], OUTPUT_TOKENS)


if __name__ == "__main__":
    main(program)
