"""The acceptance script without a GPU: its checks run, fail where they should, and are reported."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.profile_layout import Load
from tests.kernels.interpreter import use_exact_rounding
from tools import gpu_acceptance
from tools.acceptance import exchanges, kernels
from tools.acceptance.check import (
    FAILED,
    MEASURED,
    PASSED,
    SKIPPED,
    Result,
    Settings,
    SkippedError,
    at_least,
    at_most,
    equal,
    run_group,
    table,
)
from tools.acceptance.engines import Answers, _compare
from tools.acceptance.kernels import check_kernels
from tools.acceptance.operations import check_operations
from tools.acceptance.speed import QUICK, SMALL, check_speed, decode_bytes, make_worker, prefill_operations
from ulysses_infer.kernels import launch

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")


def settings(ranks: int = 1) -> Settings:
    return Settings(CPU, ranks, quick=True, model=ROOT / "models" / "demo")


def failing(_: Settings) -> Iterator[Result]:
    yield at_most("first", 1.0, 2.0)
    raise RuntimeError("a kernel died\nwith details")


def test_kernels_of_the_device_agree_with_the_torch_loop() -> None:
    found = list(check_kernels(settings()))

    assert {result.outcome for result in found} == {PASSED}
    assert {"full", "window", "soft cap", "sinks", "chunks", "ALiBi"} == {
        result.check.split(",")[1].split(":")[0].strip() for result in found
    }


def test_a_wrong_kernel_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    class Wrong:
        name = "native"

        def attend(self, query: torch.Tensor, *_: Any) -> torch.Tensor:
            return torch.zeros_like(query)

    monkeypatch.setattr(kernels, "NativeAttention", Wrong)

    assert {result.outcome for result in check_kernels(settings())} == {FAILED}


def test_operations_agree_with_torch_in_the_interpreter() -> None:
    use_exact_rounding()
    with launch.assume("cpu", (10, 0)):  # torch on a CPU multiplies FP8 with scales per channel only, as on Blackwell
        found = list(check_operations(settings()))

    assert [result.outcome for result in found].count(PASSED) == len(found) - 1 == 8, table(found)
    assert [result.check for result in found if result.outcome == SKIPPED] == ["product, FP8 per block"]


def test_operations_are_skipped_where_no_kernels_run() -> None:
    assert [r.outcome for r in run_group("operations", check_operations, settings())] == [SKIPPED]


def test_speeds_are_shares_of_the_devices_own_rates_without_targets_on_a_cpu() -> None:
    found = list(check_speed(settings()))

    assert [result.outcome for result in found] == [MEASURED] * 2 + [SKIPPED] * 5
    assert all(result.number is not None and result.number > 0 for result in found)


def test_the_work_of_a_step_is_counted_from_the_model() -> None:
    worker = make_worker(CPU, QUICK, SMALL)
    hidden, inner, layers, vocabulary = 256, 512, 2, 512
    linears = layers * (hidden * hidden * 3 + 3 * hidden * inner)  # q and o whole, k and v half each
    norms = (2 * layers + 1) * hidden

    assert (
        decode_bytes(worker, Load(3, 1, 9))
        == 2 * (linears + norms + vocabulary * hidden) + 3 * 10 * layers * 2 * 128 * 2
    )
    operations = 2 * linears * 16 + 2 * vocabulary * hidden + 2 * 16**2 * hidden * layers
    assert prefill_operations(worker, 16) == operations


@pytest.mark.distributed
@pytest.mark.parametrize("choice", ["shared_memory", "torch"])
def test_collectives_are_compared_on_every_rank(choice: str, rank_pool: Any) -> None:
    found, _ = rank_pool(2).run(exchanges.examine_choice, 2, CPU, choice)

    assert len(found["differences"]) == 7
    assert max(found["differences"].values()) < exchanges.SUM_TOLERANCE
    assert found["microseconds"] > 0


def test_collectives_that_are_not_available_are_skipped() -> None:
    assert [result.outcome for result in exchanges.check_exchanges(settings(ranks=1))] == [SKIPPED]


def test_answers_that_differ_fail() -> None:
    same = list(_compare("a", Answers([1, 2], [0.0, -1.0]), Answers([1, 2], [0.0, -1.001])))
    other = list(_compare("a", Answers([1, 2], [0.0, -1.0]), Answers([1, 3], [0.0, -1.1])))

    assert [result.outcome for result in same] == [PASSED] * 2
    assert [result.outcome for result in other] == [FAILED] * 2


def test_limits_and_counts() -> None:
    assert at_most("a", 0.5, 0.5).outcome == at_least("a", 0.5, 0.5).outcome == PASSED
    assert at_most("a", 0.6, 0.5).outcome == at_least("a", 0.4, 0.5).outcome == FAILED
    assert at_least("a", 0.4, 0.5, applies=False).outcome == SKIPPED
    assert equal("a", 3, 3).outcome == PASSED
    assert equal("a", 2, 3).outcome == equal("a", 0, 0).outcome == FAILED


def test_an_error_fails_its_group_and_keeps_what_was_found() -> None:
    first, error = run_group("group", failing, settings())

    assert (first.outcome, error.outcome) == (PASSED, FAILED)
    assert error.reason == "RuntimeError: a kernel died"


def test_a_group_may_skip_itself() -> None:
    def needs_more(_: Settings) -> Iterator[Result]:
        raise SkippedError("needs 2 GPUs")
        yield

    assert [(r.outcome, r.reason) for r in run_group("group", needs_more, settings())] == [(SKIPPED, "needs 2 GPUs")]


def test_the_table_is_aligned() -> None:
    lines = table([at_most("short", 1, 2), Result("a longer name", "-", "-", SKIPPED, "no GPU")]).splitlines()

    assert lines[0].split() == ["check", "value", "target", "result"]
    assert lines[2].endswith("skipped: no GPU")
    assert len({line.index(word) for line, word in zip(lines, ("value", "1", "-  "), strict=True)}) == 1


def test_the_exit_status_and_the_file_tell_of_failures(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setitem(gpu_acceptance.GROUPS, "kernels", f"{__name__}:failing")
    output = tmp_path / "profiles" / "cpu.json"
    words = ["--device", "cpu", "--quick", "--only", "kernels", "--output", str(output)]
    monkeypatch.setattr(sys, "argv", ["gpu_acceptance", *words])

    with pytest.raises(SystemExit) as stopped:
        gpu_acceptance.main()

    assert stopped.value.code == 1
    assert "FAIL: RuntimeError: a kernel died" in capsys.readouterr().out
    saved = json.loads(output.read_text())
    assert [check["outcome"] for check in saved["checks"]] == [PASSED, FAILED]
    assert (saved["device"], saved["ranks"]) == ("cpu", 1)


def test_ranks_divide_the_heads_of_the_bundled_model() -> None:
    assert [gpu_acceptance.default_ranks(count) for count in (0, 1, 2, 3, 7, 8, 16)] == [1, 1, 2, 2, 4, 8, 8]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_how_to_run_without_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu_acceptance", "--device", "cuda"])

    with pytest.raises(SystemExit):
        gpu_acceptance.parse()
    assert "--device cpu --quick" in capsys.readouterr().err


@pytest.mark.thorough
@pytest.mark.distributed
@pytest.mark.parametrize("ranks", [1, 2])
def test_everything_passes_on_a_cpu(ranks: int, tmp_path: Path) -> None:
    output = tmp_path / "found.json"
    words = ["--device", "cpu", "--quick", "--ranks", str(ranks), "--output", str(output)]
    done = subprocess.run(
        [sys.executable, "-m", "tools.gpu_acceptance", *words], cwd=ROOT, capture_output=True, text=True, check=False
    )

    assert done.returncode == 0, done.stdout + done.stderr
    checks = json.loads(output.read_text())["checks"]
    assert FAILED not in {check["outcome"] for check in checks}
    assert sum(check["outcome"] == PASSED for check in checks) >= (5 if ranks == 1 else 20)
