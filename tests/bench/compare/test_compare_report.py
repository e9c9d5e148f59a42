"""From runs to numbers, tables and pages."""

from __future__ import annotations

import csv
import dataclasses
import re

import pytest
from rich.console import Console

from tests.bench.compare.synthetic import INPUTS, SPEEDS, findings_of, run_of
from ulysses_infer.bench.compare.comparison import METRICS, remarks, rows_of
from ulysses_infer.bench.compare.findings import Findings, RequestRow, load_findings
from ulysses_infer.bench.compare.measuring import metrics_of
from ulysses_infer.bench.compare.protocols import PROTOCOLS
from ulysses_infer.bench.compare.tables import print_findings, write_csv
from ulysses_infer.errors import ConfigError

ALL = [case for name in ("shape", "context", "rate", "bursty") for case in PROTOCOLS[name].cases(INPUTS)]
SHAPE = PROTOCOLS["shape"].cases(INPUTS)


def by_name(findings: Findings, index: int, key: str) -> dict:
    return {row.contender: row for row in rows_of(findings, findings.cases[index]) if row.metric.key == key}


def test_medians_ranges_and_ratios_to_the_best_static_mode():
    rows = by_name(findings_of(SHAPE), 0, "ttft_ms")
    assert list(rows) == list(SPEEDS)
    assert rows["tp"].value.median == pytest.approx(105)
    assert (rows["tp"].value.low, rows["tp"].value.high) == (pytest.approx(100), pytest.approx(110))
    assert {name: round(row.ratio.median, 6) for name, row in rows.items()} == SPEEDS
    assert [name for name, row in rows.items() if row.is_best] == ["adaptive"]


def test_the_best_throughput_is_the_highest():
    rows = by_name(findings_of(SHAPE), 1, "tokens_per_second")
    assert [name for name, row in rows.items() if row.is_best] == ["adaptive"]
    assert rows["sp"].ratio.median == pytest.approx(1 / 1.5)
    assert rows["tp"].value.median == pytest.approx((8 * 110 / 0.2 + 8 * 110 / 0.22) / 2)


def test_repeats_are_paired():
    findings = findings_of(SHAPE[:1], repeats=1)
    findings.runs += [run_of(SHAPE[0], "tp", 1, 10.0), run_of(SHAPE[0], "shift", 1, 5.5)]
    findings.runs += [run_of(SHAPE[0], "sp", 1, 20.0)]
    ratio = by_name(findings, 0, "ttft_ms")["shift"].ratio
    assert (ratio.low, ratio.high) == (pytest.approx(0.55), pytest.approx(1.1))


def test_without_a_static_mode_there_is_no_ratio():
    findings = findings_of(SHAPE)
    findings.runs = [run for run in findings.runs if run.contender in ("dp", "shift")]
    assert [row.ratio for row in rows_of(findings, findings.cases[0])] == [None] * 4


def test_failed_requests_do_not_count():
    good = RequestRow(0.0, 0.1, 0.01, 0.2, 100, 10, 0, "")
    bad = RequestRow(0.5, 9.0, None, 9.0, 100, 0, 0, "boom")
    metrics = metrics_of([good, bad])
    assert metrics["ttft_ms"] == pytest.approx(100)
    assert metrics["tokens_per_second"] == pytest.approx(110 / 0.2)
    assert metrics_of([bad]) == {}
    findings = findings_of(SHAPE[:1])
    findings.runs[0].requests[0] = bad
    assert any("1 requests failed" in line and "boom" in line for line in remarks(findings))


def test_a_busy_machine_and_missing_contenders_are_named():
    findings = findings_of(SHAPE, foreign=0.7)
    findings.refused["adaptive"] = "policy adaptive is not available"
    text = " ".join(remarks(findings))
    assert "adaptive did not take part: policy adaptive is not available" in text
    assert "in 20 of 20 runs too many" in text
    assert "negligible" in " ".join(remarks(findings_of(SHAPE, foreign=0.1)))


def test_findings_are_unchanged_after_a_round_trip_to_disk(tmp_path):
    findings = findings_of(ALL)
    findings.save(tmp_path)
    assert dataclasses.asdict(load_findings(tmp_path)) == dataclasses.asdict(findings)
    (tmp_path / "results.json").write_text('{"version": 0}')
    with pytest.raises(ConfigError, match="measure again"):
        load_findings(tmp_path)
    with pytest.raises(ConfigError, match="measure first"):
        load_findings(tmp_path / "nowhere")


def test_tables_have_every_case_and_contender(tmp_path):
    findings = findings_of(ALL)
    console = Console(width=110, record=True, quiet=False, file=(tmp_path / "out").open("w"))
    print_findings(console, findings)
    text = console.export_text()
    assert all(case.title[:40] in text for case in ALL)
    assert text.count("\n adaptive ") == len(ALL)
    assert "…" not in text


def test_csv_files_hold_everything(tmp_path):
    findings = findings_of(ALL)
    write_csv(findings, tmp_path)
    requests = list(csv.DictReader((tmp_path / "requests.csv").open()))
    assert len(requests) == sum(len(run.requests) for run in findings.runs)
    assert set(requests[0]) >= {"contender", "case", "sent_s", "ttft_s", "tpot_s", "e2el_s"}
    assert len(list(csv.DictReader((tmp_path / "steps.csv").open()))) == 20 * len(findings.runs)
    summary = list(csv.DictReader((tmp_path / "summary.csv").open()))
    assert {row["metric"] for row in summary} == set(METRICS)
    shift = next(row for row in summary if (row["contender"], row["metric"]) == ("shift", "ttft_ms"))
    assert float(shift["ratio_to_best_static"]) == pytest.approx(1.1)


def test_the_report_is_one_file_that_needs_nothing_else(tmp_path):
    pytest.importorskip("matplotlib")
    from ulysses_infer.bench.compare.report import write_report

    findings = findings_of(ALL)
    page = write_report(findings, tmp_path).read_text()
    addresses = re.findall(r"""(?:src|href|url)\s*[=(]\s*["']?([^"'\s>)]{0,5})""", page)
    assert set(addresses) == {"data:"}
    assert "http://" not in page
    assert "https://" not in page
    assert "demo &lt;b&gt;" in page
    names = {"shape", "context", "rate", "bursty-timeline", "bursty-distribution"}
    assert {path.stem for path in tmp_path.glob("*.png")} == names
    assert page.count("data:image/png;base64,") == len(names)
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in tmp_path.glob("*.png"))
    assert page.count("<caption>") == len(ALL)


def test_a_report_of_few_results_shows_what_there_is(tmp_path):
    pytest.importorskip("matplotlib")
    from ulysses_infer.bench.compare.report import headline, write_report

    findings = findings_of([*SHAPE, *PROTOCOLS["bursty"].cases(INPUTS)], repeats=1)
    findings.runs = [run for run in findings.runs if run.contender in ("dp", "shift")]
    for run in findings.runs:
        run.steps = []
    assert headline(findings) == []
    assert "One shape" in write_report(findings, tmp_path).read_text()


def test_the_headline_is_shift_against_the_better_of_tp_and_sp():
    pytest.importorskip("matplotlib")
    from ulysses_infer.bench.compare.report import headline

    cards = {(card.title, card.contender): card for card in headline(findings_of(SHAPE))}
    assert cards[("TTFT, single request", "Shift, threshold")].ratio == "1.10x"
    assert cards[("TTFT, single request", "Shift, threshold")].verdict == "bad"
    assert cards[("TPOT, single request", "Shift, adaptive")].verdict == "good"
    assert cards[("tokens/s, saturated", "Shift, adaptive")].verdict == "good"
