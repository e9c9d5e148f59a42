"""`ulysses-infer plan` from the options to the table, the recipe and the report."""

from __future__ import annotations

import pytest

import ulysses_infer
from tests.planning.plans import burst, llama_config
from ulysses_infer.cli.arguments import parse
from ulysses_infer.config import load_config
from ulysses_infer.errors import ConfigError, UlyssesError
from ulysses_infer.model.injection import architectures
from ulysses_infer.planning.command import run
from ulysses_infer.planning.node import FOLDER
from ulysses_infer.planning.workload import Traffic


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    llama_config().save_pretrained(folder)
    return folder


def planned(*words: str) -> int:
    return run(parse(["plan", *map(str, words), "--max-num-seqs", "32", "--num-prompts", "12"]).options)


def test_a_plan_prints_every_layout_and_writes_a_recipe_that_loads(model, tmp_path, capsys):
    recipe = tmp_path / "best.yaml"
    assert planned(model, "--hardware", "8xh200", "--input-len", "500", "--rate", "50", "--recipe", recipe) == 0
    printed = capsys.readouterr().out
    for words in ("sp8xtp1, adaptive", "dp8 sp1xtp1, static", "recommended: ", "TTFT p50", "on the Pareto front"):
        assert words in printed
    config = load_config(recipe, [])
    assert config.parallel.num_ranks == 8
    assert f"{config.parallel.base}, {config.policy.name}" in printed


def test_a_trace_targets_and_a_price_are_in_the_table(model, tmp_path, capsys):
    trace = tmp_path / "trace.jsonl"
    trace.write_text("".join(f'{{"timestamp": {n * 10}, "input_length": 600, "output_length": 5}}\n' for n in range(9)))
    planned(model, "--hardware", "2x24gb", "--trace", trace, "--slo", "ttft:500", "tpot:50", "--price", "1")
    printed = capsys.readouterr().out
    assert "9 requests" in printed
    assert "goodput" in printed
    assert "$/M tokens" in printed


def test_targets_that_nothing_meets_name_the_one_that_binds(model, capsys):
    planned(model, "--hardware", "2x24gb", "--input-len", "900", "--output-len", "8", "--slo", "ttft:0.1", "tpot:50")
    assert "no layout meets the targets for 99 % of requests" in (printed := capsys.readouterr().out)
    assert "ttft binds: its p99 is" in printed


def test_explain_lists_operations_of_each_mode(model, capsys):
    planned(model, "--hardware", "8xh200", "--explain", "sp4xtp2")
    printed = capsys.readouterr().out
    assert "sp4xtp2, mode sp4xtp2: one decode of 4096 tokens" in printed
    assert "mode sp1xtp8: prompt of 4096 tokens" in printed
    assert "all-to-all to heads" in printed


def test_speculation_is_in_the_table_the_operations_and_the_recipe(model, tmp_path, capsys):
    recipe, words = (
        tmp_path / "best.yaml",
        ["--hardware", "8xh200", "--speculation", "ngram:acceptance=0.5,num_tokens=2"],
    )
    planned(model, *words, "--input-len", "500", "--rate", "50", "--recipe", recipe)
    printed = capsys.readouterr().out
    assert "speculation: ngram, 2 tokens, each right with a chance of 50% (assumed)" in printed
    assert "accepted" in printed
    speculation = load_config(recipe, []).speculation
    assert (speculation.method, speculation.num_tokens) == ("ngram", 2)
    planned(model, *words, "--explain", "sp4xtp2")
    assert "one decode of 4096 tokens with 2 drafted ones, which gives 1.75 tokens" in capsys.readouterr().out


def test_a_tier_below_the_cache_is_in_the_table_and_the_recipe(model, tmp_path, capsys):
    recipe, words = tmp_path / "best.yaml", ["--hardware", "8xh200", "--input-len", "500", "--offload-host-bytes"]
    planned(
        model, *words, 1 << 30, "--offload-disk-bytes", 1 << 31, "--offload-disk-folder", "/nvme", "--recipe", recipe
    )
    printed = capsys.readouterr().out
    assert "evicted prefixes: 3.0 GiB of host memory and disk per rank" in printed
    assert "tier tokens" in printed
    cache = load_config(recipe, []).cache
    assert (cache.offload_host_bytes, cache.offload_disk_bytes) == (1 << 30, 1 << 31)
    assert cache.offload_disk_folder == "/nvme"


def test_a_report_is_one_html_page_with_its_pictures(model, tmp_path):
    pytest.importorskip("matplotlib")
    report = tmp_path / "plan.html"
    planned(model, "--hardware", "8xh200", "--input-len", "300", "--report", report)
    text = report.read_text()
    assert text.count("data:image/png;base64,") == 6  # three, light and dark
    assert "http" not in text


def test_python_plans_with_a_config_object():
    plan = ulysses_infer.plan(
        llama_config(), "8xh200", Traffic(400, 10, 20.0, 10), max_num_seqs=16, max_num_batched_tokens=512
    )
    assert plan.evaluations[0] is plan.best
    assert plan.best in plan.pareto or plan.best.figures.latency.mean > 0
    traced = ulysses_infer.plan(llama_config(), "8xh200", burst(5), max_num_seqs=16, max_num_batched_tokens=512)
    assert len(traced.rows) == 5


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--hardware", "8xh20"], "nearest is 8xh200"),
        (["--hardware", "8xh200", "--slo", "ttft"], "'ttft' is not METRIC:MS"),
        (["--hardware", "8xh200", "--speculation", "eagle"], "--speculation eagle: method 'eagle' is not one of"),
        (["--hardware", "8xh200", "--bursty"], "--bursty needs --rate"),
        (["--hardware", "8xh200", "--expert-imbalance", "0.5"], "'0.5' is not a number of at least 1"),
        (["--hardware", "8xh200", "--trace", "x.csv", "--rate", "3"], "--trace has its own arrival times"),
        (["--hardware", "8xh200", "--trace", "missing.csv"], "trace 'missing.csv' cannot be read"),
        (["--hardware", "8xh200", "--explain", "sp3xtp1"], "those that fit are sp8xtp1"),
        (["--hardware", "8xh200", "--input-len", "9000"], "no request fits"),
        (["--hardware", "8xh200", "--trace", "pyproject.toml"], "'[build-system]' is not {\"timestamp\": milliseconds"),
        (["--hardware", "8xh200", "--profile", "missing.json"], "write it with ulysses-infer calibrate --output"),
        (["--hardware", "8xh200", "--profile", "pyproject.toml"], "is not a profile of step times"),
        (["--hardware", "8xh200", "--dtype", "fp4"], "invalid choice: 'fp4' (choose from"),
        (["--hardware", "8xh200", "--cache-dtype", "fp4"], "invalid choice: 'fp4' (choose from"),
        (["--hardware", "8xh200", "--expert-placement", "own"], "invalid choice: 'own' (choose from"),
        (["--hardware", "8xh200", "--window", "5"], "invalid choice: '5' (choose from"),
        (["--hardware", "8xh200", "--slo", "p50:3"], "'p50:3' is not METRIC:MS with METRIC one of ttft, tpot, latency"),
        (["--hardware", "8xh200", "--recipe", "/missing/best.yaml"], "--recipe /missing/best.yaml: it is no file in a"),
        (["--hardware", "8xh200", "--report", "."], "--report .: it is no file in a folder that exists"),
        (["--hardware", "8xh200", "--offload-disk-bytes", "9"], "give --offload-host-bytes and --offload-disk-folder"),
        (["--hardware", "8xh200", "--price", "inf"], "argument --price: 'inf' is not a price"),
        (["--hardware", "8xh200", "--slo", "ttft:5", "ttft:6"], "--slo: a metric is given twice"),
        (
            ["--hardware", "8xh200", "--input-len", "9", "--rate", "1e-300"],
            "at most 1e+09 s are simulated; give a higher --rate",
        ),
        (["--hardware", "8xh200", "--trace", "x.csv", "--time-scale", "inf"], "--time-scale: 'inf' is above 1e+09"),
        (["--hardware", "8xh200", "--trace", "x.csv", "--length-scale", "1e300"], "--length-scale: '1e300' is above"),
        (
            ["--hardware", "8xh200", "--speculation", "ngram:num_tokens=8192"],
            "num_tokens=8192 must be less than --max-num-batched-tokens 8192",
        ),
        (["--rate", "3"], "the following arguments are required: --hardware"),
        *(
            (["--hardware", "8xh200", option, "0"], f"argument {option}: '0' is not")
            for option in (
                "--nodes",
                "--max-model-len",
                "--max-num-batched-tokens",
                "--block-size",
                "--input-len",
                "--output-len",
                "--rate",
                "--price",
                "--time-scale",
            )
        ),
    ],
)
def test_a_mistake_is_one_line(model, words, message):
    with pytest.raises(ConfigError) as error:
        planned(model, *words)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.csv", b"", "has no requests"),
        ("header.csv", b"TIMESTAMP,ContextTokens,GeneratedTokens\n", "has no requests"),
        ("binary.csv", b"\x80\x81\xff", "is not a text file"),
        ("short.jsonl", b'{"timestamp": 0, "input_length": -5, "output_length": 5}', "line 1: "),
        ("endless.jsonl", b'{"timestamp": Infinity, "input_length": 5, "output_length": 5}', "line 1: "),
        ("negative.csv", b"TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:17:03,5,-1\n", "line 2: "),
    ],
)
def test_a_trace_without_requests_that_can_be_is_one_line(model, tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError) as error:
        planned(model, "--hardware", "8xh200", "--trace", tmp_path / name)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("missing", None, "missing"),
        ("own.json", "{", "own.json"),
        ("config.json", '{"model_type": "llama", "hidden_size": "wide"}', "hidden_size"),
        ("list.json", "[]", "list.json"),
        ("headless.json", '{"model_type": "llama", "num_attention_heads": 0}', "headless.json"),
        ("flat.json", '{"model_type": "llama", "num_hidden_layers": 0}', "num_hidden_layers = 0; it is at least 1"),
        ("deep.json", '{"model_type": "llama", "num_hidden_layers": 1000000000}', "at most 10000 are planned"),
        ("unknown.json", '{"model_type": "nosuch"}', "nosuch"),
        ("encoder.json", '{"model_type": "bert"}', "model type 'bert' is an encoder"),
        ("both.json", '{"model_type": "t5"}', "model type 't5'"),
        ("speech.json", '{"model_type": "whisper"}', "model type 'whisper'"),
    ],
)
def test_a_model_that_cannot_be_read_is_one_line(tmp_path, name, text, message):
    path = tmp_path / name
    if text is not None:
        path.write_text(text)
    with pytest.raises(UlyssesError) as error:
        planned(path, "--hardware", "8xh200")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("num_devices: 8", "num_devices: 0", "num_devices is 0, not from 1 to 1024"),
        ("num_devices: 8", "num_devices: 1000000000", "num_devices is 1000000000, not from 1 to 1024"),
        ("memory_bytes: 150.75e+9", "memory_bytes: -5", "memory_bytes is -5, not above 0"),
        ("flops: 716.0e+12", "flops: 0", "flops is 0, not above 0"),
        ("inter_node: [10.0e-6, 50.0e+9]", "inter_node: [10.0e-6, 0]", "the bandwidth of a link is 0, not above 0"),
        ("inter_node: [10.0e-6, 50.0e+9]", "inter_node: [1", "is not valid"),
        ("device: H200", "gpu: H200", "KeyError: 'device'"),
    ],
)
def test_a_hardware_file_that_no_node_has_is_one_line(model, tmp_path, old, new, message):
    text, path = (FOLDER / "8xh200.yaml").read_text(), tmp_path / "own.yaml"
    assert old in text
    path.write_text(text.replace(old, new))
    with pytest.raises(ConfigError) as error:
        planned(model, "--hardware", path)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--num-prompts", "1000000000"], "1,000,000,000 requests are too many to simulate; give at most 2,000,000"),
        (
            ["--num-prompts", "100000"],
            "100,000 requests with 25,000,000 output tokens, simulated for 22 layouts and policies, would take hours "
            "to days; give --num-prompts 16175, or a part of the trace",
        ),
    ],
)
def test_a_simulation_that_would_take_days_is_one_line(model, words, message):
    with pytest.raises(ConfigError) as error:
        run(parse(["plan", str(model), "--hardware", "8xh200", "--input-len", "500", *words]).options)
    assert str(error.value) == message


def test_very_many_nodes_take_no_longer_than_their_requests(model, capsys):
    planned(model, "--hardware", "8xh200", "--input-len", "300", "--output-len", "4", "--nodes", "1000000000")
    assert "dp8000000000 sp1xtp1, static" in (printed := capsys.readouterr().out)
    assert ",000,000,000 replicas got a request: fewer nodes would do for this traffic" in printed


@pytest.mark.parametrize("change", [{"num_requests": 0}, {"rate": 0.0}, {"rate": float("nan")}, {"input_len": -1}])
def test_traffic_that_cannot_be_is_one_line(change):
    with pytest.raises(ConfigError, match=f"traffic with {next(iter(change))} = .*: give a number above 0"):
        Traffic(**{"input_len": 400, "output_len": 10, "rate": 20.0, "num_requests": 10, **change})


def test_an_unverified_model_is_planned_if_that_is_allowed(model, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(architectures, "VERIFIED", frozenset({"mistral"}))
    recipe, words = tmp_path / "best.yaml", ["--hardware", "8xh200", "--input-len", "300", "--output-len", "4"]
    with pytest.raises(UlyssesError) as error:
        planned(model, *words)
    assert "give --allow-unverified, in Python allow_unverified=True, to plan it at your own risk" in str(error.value)
    planned(model, *words, "--allow-unverified", "--recipe", recipe)
    assert load_config(recipe, []).model.allow_unverified
    requests = burst(2)
    with pytest.raises(UlyssesError, match="allow_unverified=True"):
        ulysses_infer.plan(llama_config(), "8xh200", requests)
    assert ulysses_infer.plan(llama_config(), "8xh200", requests, allow_unverified=True).evaluations


def test_a_context_that_no_cache_holds_says_what_would_help(tmp_path):
    llama_config(max_position_embeddings=10**12).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"less than one request of .*\. It fits with --max-model-len \d+"):
        planned(tmp_path, "--hardware", "8xh200")


def test_a_model_that_fits_nowhere_says_what_would_help(tmp_path):
    llama_config(hidden_size=8192, num_hidden_layers=80, intermediate_size=28672).save_pretrained(tmp_path)
    with pytest.raises(
        ConfigError,
        match=r"no layout of llama fits on 2 x RTX 4090; .* too much\. It fits with nodes of 8 such devices",
    ):
        planned(tmp_path, "--hardware", "2x24gb")
