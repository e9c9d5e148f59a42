"""benchmarks/compare_peers: arithmetic, report and processes, with a fake peer."""

from __future__ import annotations

import io
import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from benchmarks.compare_peers.__main__ import keep_when_stopped, measure
from benchmarks.compare_peers.arguments import parse
from benchmarks.compare_peers.catalogue import CONTENDERS, YARDSTICKS
from benchmarks.compare_peers.comparison import Comparison
from benchmarks.compare_peers.environments import COMPLETE, RECIPES, UnavailableError, last_error, prepare
from benchmarks.compare_peers.floors import Floors, Sizes, floors
from benchmarks.compare_peers.measuring import FOREVER, Measured, Repeat, Rounds, RunningPrograms, first_tokens
from benchmarks.compare_peers.processes import Worker
from benchmarks.compare_peers.programs import LEVELS, LIMITS, PROGRAMS, Program, Setting
from benchmarks.compare_peers.report import (
    METRICS,
    as_values,
    best_of_ours,
    cells,
    markdown,
    notes,
    reached,
    same_tokens,
    table,
)
from benchmarks.compare_peers.work import CHOICES, Work, choose_work, parse_work
from benchmarks.compare_peers.workers.gguf_file import gguf_name, interleaved
from benchmarks.compare_peers.workers.limits import best_of_ways

FAKE = """
import os
from benchmarks.compare_peers.protocol import serve

def start(options):
    if options.get("refuses"):
        raise RuntimeError(options["refuses"])
    def measure(task):
        if options.get("dies"):
            os._exit(7)
        if not task:
            return {"bandwidth": 10e9, "matmul": 1e12}
        length = task["output_len"] - options.get("short", 0)
        tokens = [[options["token"]] * length for _ in task["prompts"]]
        return {"first": 0.25, "seconds": 0.25 + 0.5 * (task["output_len"] - 1), "tokens": tokens}
    return measure, "1.0"

serve(start)
"""
SETTING = Setting(Path("unused"), "bfloat16", 2, 64, 4, Path("unused"))
SINGLE, CONCURRENT = Work(1, 8, 3), Work(4, 6, 5)


def fake(**options: Any) -> Program:
    return Program([sys.executable, "-c", FAKE], {"token": 5, **options})


def children() -> set[int]:
    return {process.pid for process in psutil.Process().children()}


def becomes_stopped(process: psutil.Process) -> bool:
    deadline = time.monotonic() + 10
    while process.status() != psutil.STATUS_STOPPED and time.monotonic() < deadline:
        time.sleep(0.01)
    return process.status() == psutil.STATUS_STOPPED


def repeat(ttft: float, tpot: float, throughput: float) -> Repeat:
    return Repeat(ttft, tpot, throughput, foreign_cores=0.02)


# -- processes -----------------------------------------------------------------------------------------------------


def test_a_worker_is_stopped_between_tasks_and_leaves_nothing(tmp_path: Path) -> None:
    before = children()
    worker = Worker("fake", fake(), tmp_path / "log", seconds=60)
    (process,) = map(psutil.Process, children() - before)

    assert becomes_stopped(process)
    with worker.resumed():
        answer = worker.measure(SINGLE.task(10, 0))
    assert becomes_stopped(process)
    worker.end()

    assert (worker.version, answer["tokens"]) == ("1.0", [[5, 5, 5]])
    assert not process.is_running()


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        (fake(refuses="no\nmemory"), "RuntimeError: no memory"),
        (Program([sys.executable, "-c", "import nothing_of_this_name"], {}), "No module named 'nothing_of_this_name'"),
        (Program([sys.executable, "-c", "import time; time.sleep(60)"], {}), "did not start in time"),
    ],
)
def test_a_peer_that_does_not_start_says_why_in_one_line(tmp_path: Path, program: Program, reason: str) -> None:
    patience, before = 1 if "time.sleep" in program.command[-1] else 60, children()

    with pytest.raises(UnavailableError, match=reason) as caught:
        Worker("fake", program, tmp_path / "log", patience)

    assert "\n" not in str(caught.value)
    assert children() == before


def test_rounds_go_on_without_the_peers_that_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def not_installed(setting: Setting) -> Program:
        raise UnavailableError("pip install: no such package")

    programs = {
        LIMITS: lambda setting: fake(),
        "ours": lambda setting: fake(),
        "vllm": not_installed,
        "transformers": lambda setting: fake(dies=True),
        "llama.cpp": lambda setting: fake(short=1),
    }
    monkeypatch.setattr("benchmarks.compare_peers.measuring.PROGRAMS", programs)
    contenders = {name: CONTENDERS[name] for name in ("ours-tp", "ours-sp", "vllm", "transformers", "llama.cpp")}
    measured, said, rounds, before = Measured(), [], [], children()
    running = RunningPrograms(SETTING, tmp_path, 60, measured, said.append)

    with running.started(programs):
        Rounds(contenders, SINGLE, CONCURRENT, 10, 2).run(running, said.append, lambda: rounds.append(1))

    assert {name: len(own) for name, own in measured.repeats.items()} == {"ours-tp": 2, "ours-sp": 2}
    found = measured.repeats["ours-tp"][0]
    assert (found.ttft, found.tpot) == (0.25, 0.5)
    assert found.throughput == pytest.approx(4 * (6 + 5) / 2.25)
    assert measured.limits == [{"bandwidth": 10e9, "matmul": 1e12}] * 2
    assert len(rounds) == 2
    assert measured.unavailable["vllm"] == "pip install: no such package"
    assert "ended" in measured.unavailable["transformers"]
    assert "gave [2] tokens for 1 prompts, not 3" in measured.unavailable["llama.cpp"]
    assert children() == before


def test_ways_that_are_far_slower_than_the_fastest_are_tried_only_once():
    runs = {"fast": 0, "slow": 0}

    def way(name: str, seconds: float):
        def run() -> None:
            runs[name] += 1
            time.sleep(seconds)

        return run

    ways = {"fast": way("fast", 0.001), "slow": way("slow", 0.1)}
    hopeless = set[str]()
    rate = best_of_ways([(1.0, ways), (2.0, ways)], hopeless)
    assert hopeless == {"slow"}
    assert runs["slow"] == 1
    assert runs["fast"] > 2
    assert 1.0 / 0.1 < rate <= 2.0 / 0.001
    best_of_ways([(1.0, ways)], hopeless)
    assert runs["slow"] == 1


def test_tokens_that_differ_are_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = {LIMITS: 0, "transformers": 5, "ours": 5, "llama.cpp": 6}
    programs = {name: lambda setting, token=token: fake(token=token) for name, token in tokens.items()}
    monkeypatch.setattr("benchmarks.compare_peers.measuring.PROGRAMS", programs)
    contenders = {name: CONTENDERS[name] for name in ("ours-tp", "transformers", "llama.cpp")}

    found = first_tokens(SETTING, contenders, tmp_path, 60, SINGLE, 10, lambda text: None)

    assert found == {"ours-tp": [5] * 3, "transformers": [5] * 3, "llama.cpp": [6] * 3}
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(same_tokens(found))
    verdicts = [line.split()[-1] for line in console.export_text().splitlines() if "5 5 5" in line or "6 6 6" in line]
    assert verdicts == ["yes", "yes", "NO"]


# -- environments --------------------------------------------------------------------------------------------------


def test_an_environment_that_is_complete_is_not_made_again(tmp_path: Path) -> None:
    recipe = RECIPES["vllm"]
    (tmp_path / COMPLETE).write_text(json.dumps(asdict(recipe)))

    assert prepare("vllm", tmp_path) == tmp_path / "bin" / "python"
    assert list(tmp_path.iterdir()) == [tmp_path / COMPLETE]


def test_torch_is_installed_before_what_would_bring_another_build() -> None:
    assert RECIPES["vllm"].installs[0] == ("torch==2.13.0",)


def test_the_last_error_of_a_log_is_reported() -> None:
    assert last_error("a\nERROR: no wheel\nnote: see above\n\n") == "ERROR: no wheel"
    assert last_error("one\ntwo\n") == "two"
    assert last_error("") == ""


# -- floors --------------------------------------------------------------------------------------------------------

SHAPE = {
    "hidden_size": 8,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 16,
    "num_hidden_layers": 3,
    "vocab_size": 32,
}


def test_sizes_are_those_of_the_matrices() -> None:
    sizes = Sizes.of(SHAPE)

    attention = 8 * 8 + 2 * (8 * 4) + 8 * 8  # q, k and v, o
    assert sizes.layer_weights == attention + 3 * 8 * 16
    assert sizes.weights == 3 * sizes.layer_weights + 8 * 32
    assert sizes.decode_bytes(2, 10, 16) == 2 * (sizes.weights + 2 * 10 * 3 * 8)
    assert sizes.decode_bytes(2, 10, 4) == sizes.weights / 2 + 2 * 2 * 10 * 3 * 8


def test_prefill_counts_every_pair_of_tokens_once() -> None:
    sizes = Sizes.of(SHAPE)
    pairs = sum(position + 1 for position in range(5))

    expected = 3 * (2 * sizes.layer_weights * 5 + 4 * 8 * pairs) + 2 * 8 * 32

    assert sizes.prefill_operations(5) == expected


@given(bandwidth=st.floats(1e3, 1e12), matmul=st.floats(1e3, 1e15))
def test_a_faster_machine_never_has_a_higher_floor(bandwidth: float, matmul: float) -> None:
    slow = floors(Sizes.of(SHAPE), SINGLE, CONCURRENT, bandwidth, matmul)
    fast = floors(Sizes.of(SHAPE), SINGLE, CONCURRENT, 2 * bandwidth, 2 * matmul)

    assert fast.ttft == pytest.approx(slow.ttft / 2)
    assert fast.tpot == pytest.approx(slow.tpot / 2)
    assert fast.throughput == pytest.approx(slow.throughput * 2)


# -- report --------------------------------------------------------------------------------------------------------


@pytest.fixture
def measured() -> Measured:
    return Measured(
        repeats={
            "ours-tp": [repeat(0.1, 0.01, 900), repeat(0.3, 0.02, 1100), repeat(0.2, 0.03, 1000)],
            "ours-sp": [repeat(0.08, 0.04, 1300)],
            "vllm": [repeat(0.2, 0.05, 1000)],
            "transformers": [repeat(0.1, 0.08, 400)],
        },
        versions={LIMITS: "2", "vllm": "0.32"},
        unavailable={"llama.cpp": "no compiler"},
        limits=[{"bandwidth": bandwidth, "matmul": 1e12} for bandwidth in (1e9, 3e9, 2e9)],
    )


def test_ratios_are_of_medians_to_the_best_peer_of_each_metric(measured: Measured) -> None:
    ttft, tpot, throughput = (cells(measured, metric, {16: Floors(0.05, 0.01, 2000)}) for metric in METRICS)

    assert (ttft["ours-tp"].median, ttft["ours-tp"].low, ttft["ours-tp"].high) == pytest.approx((200, 100, 300))
    assert ttft["ours-tp"].ratio == pytest.approx(2)  # transformers is the best of the peers here
    assert tpot["ours-tp"].ratio == pytest.approx(0.4)  # and vLLM here
    assert throughput["ours-sp"].ratio == pytest.approx(1.3)
    assert (ttft["vllm"].share, throughput["vllm"].share) == pytest.approx((0.25, 0.5))
    assert list(ttft) == ["ours-tp", "ours-sp", "vllm", "transformers"]


def test_the_best_of_ours_is_chosen_for_each_metric(measured: Measured) -> None:
    best = [best_of_ours(measured, metric) for metric in METRICS]

    assert [found[0] for found in best if found] == ["ours-sp", "ours-tp", "ours-sp"]


def test_without_any_peer_there_is_no_ratio() -> None:
    alone = Measured(repeats={"ours-tp": [repeat(0.1, 0.01, 900)]})

    assert cells(alone, METRICS[0], {})["ours-tp"].ratio is None
    assert all("best peer (" not in line for line in notes(alone))


def test_the_report_names_missing_peers_and_the_reasons(measured: Measured) -> None:
    text = "\n".join(notes(measured))

    assert "llama.cpp: not measured: no compiler" in text
    assert "memory read at 3.0 GB/s" in text
    assert "16 bits, best of ours by TPOT ms: 0.40 x the best peer (TP over the ranks)" in text
    assert "other programs kept 0.02 cores busy (median), 0.02 at most\n" in text


def test_table_markdown_and_json_say_the_same(measured: Measured) -> None:
    limits = {16: Floors(0.05, 0.01, 2000)}
    console = Console(width=250, record=True, file=io.StringIO())
    console.print(table(measured, limits))
    printed, page = console.export_text(), markdown("a title", measured, limits)
    values = json.loads(json.dumps(as_values(measured, limits)))

    for text in (printed, page):
        assert "900..1100" in text
        assert "1.30x" in text
        assert "the machine's limit, 16 bits" in text
    rows = [line for line in page.splitlines() if line.startswith("|")]
    assert {line.count("|") for line in rows} == {14}
    assert values["contenders"]["ours-sp"]["tokens_per_second"]["ratio"] == pytest.approx(1.3)
    assert values["contenders"]["ours-tp"]["repeats"][1]["ttft"] == 0.3
    assert values["unavailable"] == {"llama.cpp": "no compiler"}


# -- arguments -----------------------------------------------------------------------------------------------------


@given(st.integers(1, 99), st.integers(1, 9999), st.integers(2, 999))
def test_work_is_read_as_it_is_written(count: int, given_tokens: int, wanted: int) -> None:
    assert parse_work(f"{count}x{given_tokens}/{wanted}") == Work(count, given_tokens, wanted)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--peers", "vllm,nobody"],
        ["--models", "llama-7b"],
        ["--single", "512"],
        ["--concurrent", "32x256/1"],
        ["policy"],
        ["--level", "x86-64-v9"],
    ],
)
def test_an_invalid_argument_is_refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse("", arguments)

    assert "error: " in capsys.readouterr().err


def test_prompts_are_equal_for_every_contender_and_differ_between_rounds() -> None:
    assert SINGLE.task(100, 3) == SINGLE.task(100, 3)
    assert SINGLE.task(100, 3) != SINGLE.task(100, 4)
    assert max(map(max, CONCURRENT.task(10, 0)["prompts"])) < 10


# -- GGUF ----------------------------------------------------------------------------------------------------------


def test_tensors_get_llama_cpp_names() -> None:
    assert gguf_name("model.layers.11.mlp.down_proj.weight") == "blk.11.ffn_down.weight"
    assert gguf_name("model.layers.0.post_attention_layernorm.weight") == "blk.0.ffn_norm.weight"
    assert gguf_name("lm_head.weight") == "output.weight"
    assert gguf_name("model.layers.3.self_attn.k_proj.bias") == "blk.3.attn_k.bias"


def test_interleaved_rows_make_rotary_pairs_neighbours() -> None:
    heads, dim = 3, 8
    weight = np.arange(heads * dim)[:, None]

    rows = interleaved(weight, heads).reshape(heads, dim)

    # transformers turns row i with row i + dim / 2 of a head, llama.cpp row 2 i with row 2 i + 1
    for head in range(heads):
        pairs = rows[head].reshape(-1, 2)
        assert (pairs[:, 1] - pairs[:, 0] == dim // 2).all()
        assert sorted(rows[head]) == list(range(head * dim, (head + 1) * dim))


def test_no_limit_is_below_what_an_engine_reached(measured: Measured) -> None:
    low = {16: floors(Sizes.of(SHAPE), SINGLE, CONCURRENT, 1.0, 1.0)}
    limits = reached(measured, low)[16]
    repeats = [repeat for own in measured.repeats.values() for repeat in own]
    assert limits.ttft == min(repeat.ttft for repeat in repeats)
    assert limits.tpot == min(repeat.tpot for repeat in repeats)
    assert limits.throughput == max(repeat.throughput for repeat in repeats)
    high = {16: floors(Sizes.of(SHAPE), SINGLE, CONCURRENT, 1e30, 1e30)}
    assert reached(measured, high) == high


def test_fewer_bits_do_not_lower_the_limit_of_more(measured: Measured) -> None:
    measured.repeats["ours-int8"] = [repeat(0.01, 0.001, 9000)]
    low = {bits: floors(Sizes.of(SHAPE), SINGLE, CONCURRENT, 1.0, 1e9, bits) for bits in YARDSTICKS}

    limits = reached(measured, low)

    assert limits[16].ttft == 0.08
    assert limits[8] == limits[4] == Floors(0.01, 0.001, 9000)
    assert low[8].tpot < low[16].tpot


def test_contenders_are_compared_with_those_of_equal_bits(measured: Measured) -> None:
    measured.repeats |= {
        "llama.cpp": [repeat(0.2, 0.01, 500), repeat(0.1, 0.01, 500), repeat(0.8, 0.01, 500)],
        "ours-int8": [repeat(0.3, 0.01, 500), repeat(0.2, 0.01, 500)],
        "llama.cpp-q8_0": [repeat(0.1, 0.02, 400), repeat(0.2, 0.02, 500)],
        "ours-int4": [repeat(0.1, 0.01, 600)],
    }
    ttft = cells(measured, METRICS[0], {})

    assert ttft["ours-tp"].to_yardstick == pytest.approx(0.5)  # of 0.5, 3 and 0.25, round by round
    assert ttft["ours-tp"].ratio == pytest.approx(2)  # still transformers
    assert ttft["ours-int8"].to_yardstick == pytest.approx(2)  # the median of 3 and 1
    assert ttft["ours-int4"].to_yardstick is None
    assert "8 bits, best of ours by TPOT ms: 0.50 x llama.cpp, Q8_0, 0.50 x the best peer" in "\n".join(notes(measured))


def test_quick_sizes_are_defaults_that_other_options_overrule() -> None:
    quick = parse("", ["--quick", "--repeats", "1"])
    assert (quick.models, quick.repeats, quick.seconds) == (["llama-60m"], 1, 330.0)
    assert quick.concurrent is None
    assert parse("", []).seconds == 840.0
    assert parse("", ["--seconds", "0"]).seconds == FOREVER
    assert parse("", ["--peers", "all"]).peers == list(CONTENDERS)


@given(speed=st.floats(1e-3, 1e3), seconds=st.floats(1, 1e4), visits=st.integers(1, 100))
def test_the_largest_work_that_fits_the_time_is_chosen(speed: float, seconds: float, visits: int) -> None:
    taken = {pair: pair[1].num_tokens / 100 / speed for pair in CHOICES}

    chosen = choose_work(visits, seconds, taken.__getitem__)

    assert all(4 * visits * taken[pair] > seconds for pair in CHOICES[: CHOICES.index(chosen)])
    assert 4 * visits * taken[chosen] <= seconds or chosen == CHOICES[-1]


def test_a_round_ends_when_the_time_is_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    programs = {name: lambda setting: fake() for name in ("ours", "transformers")}
    monkeypatch.setattr("benchmarks.compare_peers.measuring.PROGRAMS", programs)
    contenders = {name: CONTENDERS[name] for name in ("ours-tp", "transformers")}
    measured = Measured()
    running = RunningPrograms(SETTING, tmp_path, 60, measured, lambda text: None)

    with running.started(programs):
        Rounds(contenders, SINGLE, CONCURRENT, 10, 2, until=time.monotonic()).run(running, lambda text: None)
    with running.started(["vllm"], until=time.monotonic() - 1):
        pass

    assert measured.repeats == {}
    assert measured.unavailable["ours-tp"] == "the time was up before its first measurement"
    assert measured.unavailable["vllm"] == "not started: the time for starting was up"


def test_a_level_holds_every_engine_to_the_same_instructions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []
    monkeypatch.setattr(
        "benchmarks.compare_peers.programs.prepare", lambda name, folder: made.append(name) or Path(sys.executable)
    )
    setting = Setting(tmp_path, "bfloat16", 2, 64, 4, tmp_path, level="x86-64-v3")

    for name in ("ours", "ours-int8", "ours-single", "transformers", LIMITS):
        assert PROGRAMS[name](setting).variables.items() >= LEVELS["x86-64-v3"].items()
    weights = [PROGRAMS[name](setting).options["weights"] for name in ("llama.cpp", "llama.cpp-q8_0", "ik_llama.cpp")]

    assert weights == ["", "q8_0", ""]
    assert made == ["llama.cpp-x86-64-v3", "llama.cpp-x86-64-v3", "ik_llama.cpp"]
    assert "-DGGML_AVX512=OFF" in RECIPES["llama.cpp-x86-64-v3"].variables["CMAKE_ARGS"]
    with pytest.raises(UnavailableError, match="cannot be held to x86-64-v3"):
        PROGRAMS["vllm"](setting)


def test_an_interrupted_run_keeps_what_it_has() -> None:
    options = parse("", [])
    with keep_when_stopped(options):
        raise KeyboardInterrupt
    assert options.stopped


# -- preparing, and the time --------------------------------------------------------------------------------------


@pytest.fixture
def programs(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The programs of a comparison, to be filled with fakes."""
    made: dict[str, Any] = {}
    for module in ("measuring", "preparing"):
        monkeypatch.setattr(f"benchmarks.compare_peers.{module}.PROGRAMS", made)
    return made


@pytest.fixture
def comparison(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Comparison]:
    """Makes comparisons of two contenders on a checkpoint that is only a shape."""
    (tmp_path / "config.json").write_text(json.dumps(SHAPE))
    monkeypatch.setattr("benchmarks.compare_peers.comparison.find_model", lambda *_: tmp_path)
    places = ["--output", str(tmp_path / "out"), "--environments", str(tmp_path)]

    def make(name: str = "llama-60m", *arguments: str) -> Comparison:
        chosen = ("--peers", "ours-tp,llama.cpp", "--single", "1x8/3", "--concurrent", "4x6/5", "--repeats", "1")
        return Comparison(name, parse("", [*chosen, *places, *arguments]), Console(file=io.StringIO()))

    return make


def test_all_is_prepared_once_before_the_time_counts(
    comparison: Callable[..., Comparison], programs: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[str] = []
    start = RunningPrograms._start
    monkeypatch.setattr(
        RunningPrograms, "_start", lambda own, name, *rest: (started.append(name), start(own, name, *rest))
    )
    programs |= {name: lambda setting: fake() for name in (LIMITS, "ours", "llama.cpp")}
    found = comparison()
    found.prepare()
    assert started == [LIMITS, "ours", "llama.cpp"]
    comparison().prepare()
    assert len(started) == 3
    assert found.is_prepared
    found.run(60.0, lambda: None)
    assert set(found.measured.repeats) == {"ours-tp", "llama.cpp"}
    assert found.measured.unavailable == {}


def test_what_cannot_be_prepared_takes_none_of_the_time(
    comparison: Callable[..., Comparison], programs: dict[str, Any]
) -> None:
    asked: list[str] = []

    def broken(setting: Setting) -> Program:
        asked.append("llama.cpp")
        raise UnavailableError("no compiler")

    programs |= {LIMITS: lambda setting: fake(), "ours": lambda setting: fake(), "llama.cpp": broken}
    found = comparison()
    found.prepare()
    found.run(60.0, lambda: None)
    assert asked == ["llama.cpp"]
    assert set(found.measured.repeats) == {"ours-tp"}
    assert found.measured.unavailable["llama.cpp"] == "no compiler"


def test_an_environment_that_could_not_be_made_is_not_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[Path] = []

    def fail(recipe: Any, folder: Path) -> Path:
        tried.append(folder)
        raise UnavailableError("no network")

    monkeypatch.setattr("benchmarks.compare_peers.environments.prepare_recipe", fail)
    for _ in range(2):
        with pytest.raises(UnavailableError, match="no network"):
            prepare("vllm", tmp_path / "vllm")
    assert tried == [tmp_path / "vllm"]


class Timed:
    """Stands for a comparison that takes `lasts` seconds of a clock, if it was prepared."""

    def __init__(self, clock: list[float], lasts: float, is_prepared: bool = True) -> None:
        self.clock, self.lasts, self.is_prepared, self.seconds = clock, lasts, is_prepared, -1.0

    def run(self, seconds: float, after_round: Callable[[], None]) -> None:
        self.seconds = seconds
        self.clock[0] += self.lasts


class Shown:
    """Stands for the results: what was written and shown."""

    def __init__(self) -> None:
        self.shown: list[Timed] = []

    def write(self, found: Timed) -> None:
        pass

    def show(self, found: Timed) -> None:
        self.shown.append(found)


def test_each_model_gets_its_share_of_what_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, shown = [1000.0], Shown()
    monkeypatch.setattr("benchmarks.compare_peers.__main__.time.monotonic", lambda: clock[0])
    models = [Timed(clock, 0.0, is_prepared=False), Timed(clock, 60.0), Timed(clock, 300.0), Timed(clock, 0.0)]
    measure(models, shown, parse("", ["--seconds", "300"]))  # type: ignore[arg-type]
    assert [model.seconds for model in models[1:]] == [100.0, 120.0, 0.0]
    assert shown.shown == models


def test_a_model_for_which_no_time_is_left_is_named(
    comparison: Callable[..., Comparison], programs: dict[str, Any]
) -> None:
    programs |= {name: lambda setting: fake() for name in (LIMITS, "ours", "llama.cpp")}
    found = comparison()
    found.prepare()
    found.run(0.0, lambda: None)
    assert "llama-60m: not measured: the time was up before it began" in "\n".join(notes(found.measured))
