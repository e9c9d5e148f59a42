"""`ulysses-infer bench replay` from its options to its table and file."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import pytest

from tests.bench.serve.fake_server import FakeServer
from tests.bench.serve.test_command import serving
from ulysses_infer.bench.replay.replay_bench import run
from ulysses_infer.bench.replay.replay_options import parse_replay, window_of
from ulysses_infer.bench.replay.scaling import Window
from ulysses_infer.cli.arguments import parse
from ulysses_infer.errors import ConfigError

MOONCAKE = [
    {"timestamp": 0, "input_length": 1024, "output_length": 40, "hash_ids": [1, 2]},
    {"timestamp": 60_000, "input_length": 1536, "output_length": 80, "hash_ids": [1, 2, 3]},
    {"timestamp": 61_000, "input_length": 1024, "output_length": 900, "hash_ids": [1, 4]},
    {"timestamp": 200_000, "input_length": 1024, "output_length": 40, "hash_ids": [1, 5]},
]


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    path = tmp_path / "mooncake.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in MOONCAKE))
    return path


def test_a_window_is_replayed_to_scale_at_its_moments_with_shared_prefixes(trace, tmp_path, capsys):
    file = tmp_path / "result.json"
    options = ["--start-minute", "1", "--time-scale", "0.2", "--length-scale", "0.0625", "--end-minute", "2"]
    options += ["--max-output-len", "20", "--result-file", str(file), "--goodput", "ttft:1000", "--vocab-size", "5000"]
    with serving(FakeServer()) as server:
        assert run(parse_replay([str(trace), "--base-url", server.url, *options])) == 0
    first, second = server.bodies
    assert [body["max_tokens"] for body in (first, second)] == [5, 20]
    assert [len(body["prompt"]) for body in (first, second)] == [96, 64]
    assert first["prompt"][:32] == second["prompt"][:32]
    assert first["prompt"][32:34] != second["prompt"][32:34]
    assert first["ignore_eos"] is True
    assert [b - a for a, b in pairwise(server.moments)] == [pytest.approx(0.2, abs=0.1)]
    said = capsys.readouterr().out
    assert "mooncake.jsonl: 2 requests in 0 s" in said
    assert "Successful requests:                     2" in said
    assert "client: late by" in said
    result = json.loads(file.read_text())
    assert (result["dataset"], result["start_minute"], result["end_minute"]) == ("mooncake.jsonl", 1, 2)
    assert result["request_goodput"] > 0
    assert result["start_times"][1] - result["start_times"][0] == pytest.approx(0.2, abs=0.1)


def test_end_tokens_count_if_asked_for(trace):
    assert parse_replay([str(trace)]).ignore_eos is True
    assert parse_replay([str(trace), "--stop-at-eos"]).ignore_eos is False


def test_the_papers_window_is_a_preset(trace):
    assert window_of(parse_replay([str(trace), "--window", "paper"])) == Window(0, 15)
    assert window_of(parse_replay(["code.csv", "--window", "paper"])) == Window(2, 17)
    assert window_of(parse_replay([str(trace)])) == Window()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--window", "paper", "--start-minute", "1"], "give one of them"),
        (["--start-minute", "3", "--end-minute", "3"], "is not before"),
        (["--start-minute", "-1"], "is not a minute"),
        (["--time-scale", "0"], "is not above 0"),
        (["--start-minute", "50"], "no requests from minute 50"),
        (["--endpoint", "chat", "--prompt-format", "ids"], "chat takes messages"),
        (["--nonsense"], "nonsense"),
    ],
)
def test_senseless_options_are_refused(trace, options, message):
    with pytest.raises(ConfigError, match=message):
        run(parse_replay([str(trace), *options]))


def test_it_is_a_command_without_a_recipe(trace):
    command = parse(["bench", "replay", str(trace)])
    assert command.name == "bench replay"
    with pytest.raises(ConfigError, match="without a launcher"):
        command.config()
