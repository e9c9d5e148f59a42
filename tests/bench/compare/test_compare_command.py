"""`ulysses-infer bench compare`: its options, and one whole comparison of a tiny model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.caches import empty_cache
from tests.tiny import tiny_llama
from ulysses_infer.cli.arguments import parse
from ulysses_infer.errors import ConfigError

ROOT = Path(__file__).resolve().parents[3]
SETTINGS = (
    "cache.num_blocks=256",
    "cache.block_size=4",
    "scheduler.max_num_batched_tokens=64",
    "policy.threshold_tokens=16",
    "policy.calibration_seconds=1",
    "runtime.threads_per_rank=1",
    "runtime.device=cpu",
)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--protocol", "shape,nothing"], "'nothing': choose from shape"),
        (["--contenders", "tp,tp"], "contains a name twice"),
        (["--scale", "huge"], "huge"),
        (["--trace", "nowhere.csv"], r"--trace 'nowhere\.csv' is not a file"),
        (["--repeats", "0"], "at least 1"),
        (["--protocol", "trace"], "needs --trace FILE"),
        (["--speculation", "medusa"], "'medusa': choose from ngram, suffix"),
        (["--speculation", "ngram"], "3 servers do not fit at once; add --in-turn"),
        (["--random-model", "llama-60m"], "give one of them"),
    ],
)
def test_senseless_options_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        parse(["bench", "compare", "model", *options])


def test_model_recipe_and_keys_are_those_of_other_commands():
    command = parse(["bench", "compare", "model", "--config", "r.yaml", "--repeats", "2", "parallel.sp=4"])
    assert (command.name, command.options.config, command.options.repeats) == ("bench compare", "r.yaml", 2)
    assert command.overrides == ["parallel.sp=4", "model.path=model"]


CONTENDERS = {"dp": {(1, 1)}, "tp": {(1, 2)}, "sp": {(2, 1)}, "shift": {(1, 2), (2, 1)}, "adaptive": None}
"""The modes that each has to take; None for any."""


@pytest.mark.launcher
@pytest.mark.timeout(600)
@pytest.mark.parametrize("names", [["shift"], pytest.param([*CONTENDERS], marks=pytest.mark.thorough)])
def test_a_tiny_comparison_from_start_to_report(tmp_path, names):
    tiny_llama(tmp_path / "model")
    output = tmp_path / "report"
    command = [sys.executable, "-m", "ulysses_infer.cli.main", "bench", "compare", str(tmp_path / "model"), "--scale"]
    whole = len(names) == len(CONTENDERS)
    protocols = ["shape", "bursty"] if whole else ["bursty"]
    command += ["smoke", "--repeats", "1", "--protocol", ",".join(protocols), "--output", str(output), *SETTINGS]
    command += [] if whole else ["--contenders", ",".join(names)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    environment["XDG_CACHE_HOME"] = empty_cache(tmp_path / "cache")
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=540)
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads((output / "results.json").read_text())
    assert results["contenders"] == names
    assert results["refused"] == {}
    assert len(results["runs"]) == (3 if whole else 1) * len(names)
    assert [request for run in results["runs"] for request in run["requests"] if request[-1]] == []
    modes = {run["contender"]: {(step[2], step[3]) for step in run["steps"]} for run in results["runs"]}
    assert set(modes) == set(names)
    assert all(modes[name] == CONTENDERS[name] for name in names if CONTENDERS[name])
    page = (output / "report.html").read_text()
    assert "http://" not in page
    assert {path.name for path in output.glob("*.csv")} == {"summary.csv", "requests.csv", "steps.csv"}
