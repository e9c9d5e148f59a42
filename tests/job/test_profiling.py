"""Traces of torch's profiler: one file per rank with the steps of that time, and one line for each misuse."""

import gzip
import json

import pytest

from tests.tiny import settings
from ulysses_infer import LLM, SamplingParams, init_inference
from ulysses_infer.errors import RequestError

GREEDY = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)


def names_of(path):
    with gzip.open(path) as file:
        return [event["name"] for event in json.load(file)["traceEvents"] if "name" in event]


def steps_of(path):
    return [name for name in names_of(path) if name.startswith("step ")]


def test_a_trace_has_the_steps_between_start_and_stop(folder, tmp_path):
    target = tmp_path / "new" / "traces"
    with LLM(folder, **settings(**{"runtime.profile_folder": str(target)})) as llm:
        with pytest.raises(RequestError, match="no trace is being recorded; call start_profile first"):
            llm.stop_profile()
        llm.generate(["hello"], GREEDY)
        llm.start_profile()
        with pytest.raises(RequestError, match="a trace is being recorded already; call stop_profile first"):
            llm.start_profile()
        llm.generate([[5, 6, 7]], GREEDY)
        llm.stop_profile()
        llm.generate(["hello"], GREEDY)
        (trace,) = target.iterdir()
        steps = steps_of(trace)
        assert len(steps) == 6
        assert steps[0].endswith(": sp1xtp1, 3 tokens of 1 requests")
        assert any(name.startswith("aten::") for name in names_of(trace))
        llm.start_profile()
        llm.stop_profile()
        assert len(list(target.iterdir())) == 2


def test_without_a_folder_or_with_one_that_cannot_be_made_it_is_one_line(folder, tmp_path):
    file = tmp_path / "file"
    file.touch()
    with (
        init_inference(folder, **settings()) as engine,
        pytest.raises(RequestError, match=r"runtime.profile_folder is not set; start with runtime.profile_folder="),
    ):
        engine.start_profile()
    with init_inference(folder, **settings(**{"runtime.profile_folder": str(file / "x")})) as engine:
        with pytest.raises(Exception, match=r"runtime.profile_folder = .*file/x: Not a directory; name a folder"):
            engine.start_profile()
        with pytest.raises(RequestError, match="no trace is being recorded"):
            engine.stop_profile()
        assert engine.generate(["hello"], GREEDY)[0].outputs[0].token_ids


def record(folder, target):
    """On a rank: record a trace in each mode."""
    with init_inference(folder, **settings(2, 1, **{"runtime.profile_folder": target})) as engine:
        for mode in ("sp", "tp"):
            engine.set_policy("static", mode=mode)
            engine.start_profile()
            engine.generate([[5, 6, 7]], GREEDY)
            engine.stop_profile()


@pytest.mark.distributed
@pytest.mark.thorough
def test_every_rank_writes_a_file_of_its_own(rank_pool, folder, tmp_path):
    rank_pool(2).run(record, folder, str(tmp_path))
    found = sorted(tmp_path.iterdir())
    assert [path.name.split(".")[0] for path in found] == ["rank_0", "rank_0", "rank_1", "rank_1"]
    assert all(len(steps_of(path)) == 6 for path in found)
    assert {steps_of(path)[0].split(": ")[1].split(",")[0] for path in found} == {"sp2xtp1", "sp1xtp2"}
