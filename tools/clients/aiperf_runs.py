"""The package `aiperf`: a short load on each of the endpoints that it knows and the server has."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

from tools.clients.checking import Check, Results, Server, equal, error_of, main

REQUESTS, OUTPUT_TOKENS = 6, 8
STREAMED = ("chat", "completions", "responses", "messages")
ENDPOINTS = (*STREAMED, "embeddings", "cohere-rankings")


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
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
        sys.stdout.write(done.stdout)
        check_summary(json.loads((Path(folder) / "profile_export_aiperf.json").read_text("utf-8")), is_streamed)


def check_summary(summary: dict[str, Any], is_streamed: bool) -> None:
    """Raises `AssertionError` if requests failed, or streams were too short."""
    equal(summary.get("error_summary") or [], [])
    equal(summary["request_count"]["avg"], REQUESTS)
    if is_streamed:
        equal(summary["output_sequence_length"]["avg"], OUTPUT_TOKENS)


if __name__ == "__main__":
    main(program)
