"""`launch.py` under the real `deepspeed` launcher: what it prints, how it fails, what it leaves behind."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

import pytest
import yaml

from tests.launcher import DEMO, LAUNCH, ROOT, WAIT_SECONDS, Running, deepspeed, environment, run, ulysses_infer
from tests.server.job import ForkedRank
from ulysses_infer.job.processes import free_port
from ulysses_infer.launch import import_from_checkout

pytestmark = pytest.mark.launcher

ENDLESS = [*DEMO, "generate.sampling.max_tokens=1500", "generate.sampling.ignore_eos=true"]
GENERATING = "--- step 0"


def test_demo_shifts_between_both_modes_and_accounts_for_it(tmp_path: Path) -> None:
    output = tmp_path / "results.jsonl"
    result = run(deepspeed(2, *DEMO, "generate.sampling.max_tokens=24", f"generate.output={output}"))

    assert result.returncode == 0, result.stderr
    assert "--- step 0: SP 2" in result.stdout
    assert "--- step 1: TP 2" in result.stdout
    assert "switches 7" in result.stdout
    assert "Traceback" not in result.stdout + result.stderr
    records = [json.loads(line) for line in output.read_text().splitlines()]
    assert [record["index"] for record in records] == list(range(6))
    assert all(record["ttft_ms"] > 0 and record["outputs"][0]["finish_reason"] for record in records)
    stats = json.loads(output.with_suffix(".stats.json").read_text())
    assert set(stats["modes"]) == {"sp2xtp1", "sp1xtp2"}
    resolved = yaml.safe_load(output.with_suffix(".config.yaml").read_text())
    assert resolved["parallel"]["sp"] == 2
    assert resolved["generate"]["sampling"]["max_tokens"] == 24


ERRORS = [
    ("polcy.name=static", "error: unknown key 'polcy.name' in the command line; did you mean 'policy.name'?"),
    ("parallel.sp=4", "error: parallel.sp * parallel.tp = 4 * 1 = 4, but the job has 2 ranks; start 4 ranks"),
    ("cache.num_blocks=1", "error: "),  # found when the engine is up
]


def assert_one_line(printed: str, message: str) -> None:
    errors = [line for line in printed.splitlines() if line.startswith("error:")]
    assert len(errors) == 1, printed
    assert errors[0].startswith(message)
    assert "Traceback" not in printed


@pytest.mark.parametrize(("override", "message"), ERRORS)
def test_user_error_is_one_line_from_all_ranks_together(override: str, message: str) -> None:
    meeting = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    read, write = os.pipe()
    ranks = [
        ForkedRank([*DEMO, override], {**environment(), **meeting, "RANK": str(rank), "LOCAL_RANK": str(rank)}, write)
        for rank in range(2)
    ]
    os.close(write)
    assert ranks[0].wait(WAIT_SECONDS) == 2
    ranks[1].kill()  # as a launcher does once a rank has ended
    ranks[1].wait(WAIT_SECONDS)
    with open(read) as printed:
        assert_one_line(printed.read(), message)


@pytest.mark.thorough
@pytest.mark.parametrize(("override", "message"), ERRORS)
def test_user_error_is_one_line_under_the_launcher(override: str, message: str) -> None:
    result = run(deepspeed(2, *DEMO, override))

    assert result.returncode == 2
    assert_one_line(result.stdout + result.stderr, message)


@pytest.mark.thorough  # `cli/test_killed_commands.py` kills a whole command
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_no_rank_outlives_the_launcher(number: int) -> None:
    with Running(deepspeed(2, *ENDLESS)) as job:
        job.wait_for_output(GENERATING)
        assert len(job.started) == 3  # the launcher's helper and two ranks

        job.process.send_signal(number)

        assert job.left_after(seconds=5) == []
        assert "Traceback" not in job.rest_of_output()


@pytest.mark.thorough
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signal_to_the_front_end_ends_the_whole_job(number: int, status: int) -> None:
    with Running(ulysses_infer(*ENDLESS)) as job:
        job.wait_for_output(GENERATING)

        job.process.send_signal(number)

        assert job.process.wait(timeout=10) == status
        assert job.left_after(seconds=5) == []
        assert "Traceback" not in job.rest_of_output()


def test_script_finds_the_package_without_its_modules_on_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [str((ROOT / LAUNCH).parent), "/elsewhere"])

    import_from_checkout()

    assert sys.path == [str(ROOT), "/elsewhere"]
