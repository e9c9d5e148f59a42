"""`ulysses-infer bench serve` from its options to its table and file."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import pytest

from tests.bench.serve.fake_server import FakeServer, Script
from ulysses_infer.bench.serve.arrivals import Ramp
from ulysses_infer.bench.serve.serve_bench import run
from ulysses_infer.bench.serve.serve_options import parse_serve, rate_of
from ulysses_infer.cli.arguments import parse
from ulysses_infer.errors import ConfigError, RequestError


@contextmanager
def serving(server: FakeServer) -> Iterator[FakeServer]:
    """The server in a thread of its own, while the block runs."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    asyncio.run_coroutine_threadsafe(server.__aenter__(), loop).result()
    try:
        yield server
    finally:
        asyncio.run_coroutine_threadsafe(server.__aexit__(), loop).result()
        loop.call_soon_threadsafe(loop.stop)
        thread.join()


def bench(server: FakeServer, *options: str) -> int:
    return run(parse_serve(["--base-url", server.url, *options]))


def test_everything_asked_for_is_sent_and_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "result.json"
    with serving(FakeServer()) as server:
        options = [
            "--num-prompts",
            "6",
            "--input-len",
            "5",
            "--output-len",
            "3",
            "--ignore-eos",
            "--request-rate",
            "200",
        ]
        more = ["--extra-body", '{"top_k": 4}', "--metadata", "team=blue", "--percentiles", "50,99.9"]
        assert bench(server, *options, *more, "--result-file", str(file), "--goodput", "ttft:500") == 0

    assert len(server.bodies) == 6
    body = server.bodies[0]
    assert (body["model"], body["max_tokens"], body["ignore_eos"], body["top_k"]) == ("fake", 3, True, 4)
    assert body["stream_options"] == {"include_usage": True}
    assert len(body["prompt"]) == 5
    record = json.loads(file.read_text())
    assert (record["completed"], record["total_input_tokens"], record["total_output_tokens"]) == (6, 30, 18)
    assert (record["model_id"], record["request_rate"], record["team"]) == ("fake", 200.0, "blue")
    assert record["p99.9_ttft_ms"] > 0
    printed = capsys.readouterr().out
    assert printed.startswith("============ Serving Benchmark Result ============\n")
    assert "Request goodput (req/s):" in printed
    assert "client: late by" in printed


def test_chat_gets_messages(tmp_path: Path) -> None:
    file = tmp_path / "asked.jsonl"
    messages = [{"role": "system", "content": "be kind"}, {"role": "user", "content": "hi"}]
    file.write_text("\n".join(map(json.dumps, [{"prompt": "hello"}, {"messages": messages}])))
    with serving(FakeServer()) as server:
        options = ["--dataset", "custom", "--dataset-path", str(file), "--output-len", "2", "--model", "m"]
        assert bench(server, "--endpoint", "chat", *options) == 0

    assert [body["messages"] for body in server.bodies] == [[{"role": "user", "content": "hello"}], messages]


def test_trace_is_sent_at_its_times(tmp_path: Path) -> None:
    file = tmp_path / "trace.jsonl"
    rows = [{"timestamp": 100 * n, "input_length": 4, "output_length": n + 1} for n in range(4)]
    file.write_text("\n".join(map(json.dumps, rows)))
    with serving(FakeServer()) as server:
        assert bench(server, "--dataset", "timed_trace", "--dataset-path", str(file)) == 0

    gaps = [later - earlier for earlier, later in pairwise(server.moments)]
    assert gaps == pytest.approx([0.1] * 3, abs=0.08)
    assert [body["max_tokens"] for body in server.bodies] == [1, 2, 3, 4]


def test_duration_keeps_the_given_number_in_flight() -> None:
    with serving(FakeServer(Script(first=0.02))) as server:
        assert bench(server, "--duration", "0.3", "--max-concurrency", "2", "--output-len", "1") == 0

    assert 4 <= len(server.bodies) <= 32


def test_failures_are_shown_and_fail_the_command_if_nothing_succeeded(capsys: pytest.CaptureFixture[str]) -> None:
    with serving(FakeServer(Script(ending="cut"))) as server:
        assert bench(server, "--num-prompts", "3") == 1

    printed = capsys.readouterr().out
    assert "Failed requests:                         3" in printed
    assert "failed, 3 x: the connection was closed in the middle of the answer" in printed


def test_unreachable_server_is_a_one_line_error() -> None:
    with pytest.raises(ConfigError, match=r"^no server at http://127\.0\.0\.1:9: [^\n]*set --base-url$"):
        run(parse_serve(["--base-url", "http://127.0.0.1:9"]))


def test_server_without_a_tokenizer_says_how_to_get_token_ids() -> None:
    with serving(FakeServer(has_tokenizer=False)) as server:
        with pytest.raises(ConfigError, match="--vocab-size"):
            bench(server, "--prompt-format", "ids")
        assert bench(server, "--num-prompts", "2", "--input-len", "4", "--vocab-size", "9") == 0
        assert bench(server, "--num-prompts", "2", "--input-len", "4") == 0

    assert all(max(body["prompt"]) < 9 for body in server.bodies[:2])
    assert all(isinstance(body["prompt"], str) for body in server.bodies[2:])


def test_server_without_models_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(FakeServer()) as server, pytest.raises(RequestError, match="HTTP 404"):
        bench(server, "--base-url", server.url + "/elsewhere")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--dataset", "custom"], "needs --dataset-path"),
        (["--endpoint", "chat", "--prompt-format", "ids"], "chat takes messages"),
        (["--endpoint", "embeddings"], "choose from completions, chat"),
        (["--duration", "5"], "needs --max-concurrency"),
        (["--duration", "5", "--max-concurrency", "2", "--request-rate", "3"], "takes no rate"),
        (["--dataset", "timed_trace", "--dataset-path", "x", "--request-rate", "3"], "its own times"),
        (["--ramp-up", "linear"], "needs --ramp-up-from"),
        (["--ramp-up-to", "4"], "need --ramp-up linear"),
        (["--ramp-up", "exponential", "--ramp-up-from", "0", "--ramp-up-to", "4"], "only if it is linear"),
        (["--ramp-up", "linear", "--ramp-up-from", "1", "--ramp-up-to", "4", "--request-rate", "3"], "one of them"),
        (["--request-rate", "0"], "not above 0"),
        (["--request-rate", "nan"], "not a number"),
        (["--range-ratio", "1"], "below 1"),
        (["--num-prompts", "0"], "at least 1"),
        (["--goodput", "itl:5"], "choose from ttft:MS"),
        (["--percentiles", "50,101"], "from 0 to 100"),
        (["--metadata", "x"], "not KEY=VALUE"),
        (["--extra-body", "[]"], "not a JSON object"),
        (["--result-file", "/no/such/folder/x.json"], "does not exist"),
        (["--reqest-rate", "3"], "unrecognized arguments: --reqest-rate"),
    ],
)
def test_senseless_options_are_refused_in_one_line(options: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=r"^[^\n]+$") as raised:
        parse_serve(options)
    assert words in str(raised.value)


def test_option_names_of_other_benchmarks_are_understood() -> None:
    flags = ["--dataset-name", "random", "--random-input-len", "7", "--endpoint", "/v1/chat/completions"]
    ramp = ["--ramp-up-strategy", "exponential", "--ramp-up-start-rps", "1", "--ramp-up-end-rps", "8"]
    options = parse_serve([*flags, *ramp, "--metric-percentiles", "90"])

    assert (options.input_len, options.endpoint, options.percentiles) == (7, "chat", [90.0])
    assert rate_of(options, 5) == Ramp(1.0, 8.0, 5, is_exponential=True)


def test_command_refuses_to_run_under_a_launcher() -> None:
    command = parse(["bench", "serve", "--num-prompts", "3"])

    with pytest.raises(ConfigError, match="run it without a launcher"):
        command.config()


def test_command_needs_neither_torch_nor_a_launcher() -> None:
    with serving(FakeServer()) as server:
        arguments = ["bench", "serve", "--base-url", server.url, "--num-prompts", "2", "--output-len", "2"]
        code = (
            f"import sys; from ulysses_infer.cli.main import main\nsys.argv[1:] = {arguments}\n"
            "try: main()\nfinally: assert not {'torch', 'deepspeed', 'transformers'} & set(sys.modules)"
        )
        result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert "Successful requests:                     2" in result.stdout
