"""A server of two ranks records traces over HTTP while it serves."""

import gzip
import json

import httpx
import pytest

from tests.server.job import ADMIN, Job

pytestmark = [pytest.mark.distributed, pytest.mark.thorough]
WANTED = {"max_tokens": 6, "messages": [{"role": "user", "content": "hi"}]}


def steps_of(path):
    with gzip.open(path) as file:
        return [event["name"] for event in json.load(file)["traceEvents"] if event.get("name", "").startswith("step ")]


def test_both_ranks_write_the_steps_between_start_and_stop(folder, tmp_path):
    settings = {"runtime.profile_folder": str(tmp_path / "traces")}
    with Job(folder, **settings) as job:

        def post(path, body=None, headers=ADMIN):
            return httpx.post(job.url + path, json=body, headers=headers, timeout=120)

        assert post("/start_profile", headers=None).status_code == 401
        assert post("/stop_profile").json()["error"]["message"].startswith("no trace is being recorded")
        job.complete()
        assert post("/start_profile").json() == {"status": "profiling"}
        assert post("/start_profile").status_code == 400
        message = post("/v1/messages", {"model": "tiny", "temperature": 0, "ignore_eos": True, **WANTED}).json()
        assert message["usage"]["output_tokens"] == WANTED["max_tokens"]
        assert post("/stop_profile").json() == {"status": "written"}
        job.complete()
    traces = sorted((tmp_path / "traces").iterdir())
    assert [path.name.split(".")[0] for path in traces] == ["rank_0", "rank_1"]
    first, second = map(steps_of, traces)
    assert len(first) == WANTED["max_tokens"]
    assert first == second
    assert first[0].split(": ")[1].split(",")[0] == "sp2xtp1"  # a prompt, then tokens one by one
    assert first[-1].split(": ")[1].split(",")[0] == "sp1xtp2"


def test_ranks_that_write_a_long_trace_do_not_look_hung(folder, tmp_path):
    settings = {"runtime.profile_folder": str(tmp_path), "server.heartbeat_timeout": 1, "runtime.enforce_eager": True}
    with Job(folder, **settings) as job:
        for command in ("start_profile", "stop_profile"):
            assert httpx.post(f"{job.url}/{command}", headers=ADMIN, timeout=120).status_code == 200
            assert [job.complete(max_tokens=400).status_code for _ in range(2)] == [200] * 2, job.output
    traces = list(tmp_path.iterdir())
    assert [len(steps_of(path)) for path in traces] == [2 * 400] * 2
