"""The package `guidellm`: a short load on each of the request formats that it knows and the server has."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

from tools.clients.checking import Check, Results, Server, equal, error_of, main

REQUESTS, OUTPUT_TOKENS = 6, 8
FORMATS = ("/v1/chat/completions", "/v1/completions", "/v1/responses")


def program(server: Server, results: Results) -> None:
    """Each format is a check."""
    for name in FORMATS:
        check: Check = partial(run, name=name)
        results.write(f"{name} streamed", error_of(check, server))


def run(server: Server, name: str) -> None:
    """Raises `AssertionError` unless all requests were answered with the number of tokens asked for."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "report.json"
        options = {
            "backend": f"kind=openai_http,target={server.url},model={server.model},request_format={name},timeout=600",
            "tokenizer": f"kind=hf_auto,model={server.tokenizer}",
            "profile": "kind=concurrent,streams=2",
            "constraint": f"kind=max_requests,count={REQUESTS}",
            "data": f"kind=synthetic_text,prompt_tokens=24,output_tokens={OUTPUT_TOKENS}",
            "output": f"kind=json,path={path}",
        }
        command = [str(Path(sys.executable).with_name("guidellm")), "run", "--disable-console-interactive"]
        command += [word for option, value in options.items() for word in (f"--{option}", value)]
        subprocess.run(command, check=False)
        (report,) = json.loads(path.read_text("utf-8"))["benchmarks"]
    made = report["scheduler_metrics"]["requests_made"]
    equal((made["successful"], made["errored"], made["incomplete"]), (REQUESTS, 0, 0))
    tokens = [request["output_metrics"]["text_tokens"] for request in report["requests"]["successful"]]
    equal(tokens, [OUTPUT_TOKENS] * REQUESTS)


if __name__ == "__main__":
    main(program)
