"""The ingress's end of the engine, with replicas that are played by a script."""

import asyncio
import pickle
import socket
import time
from types import SimpleNamespace

import pytest
from msgspec import structs
from prometheus_client.parser import text_string_to_metric_families

from tests.server.fake_engine import READY, STATE
from ulysses_infer.config import Config
from ulysses_infer.errors import EngineDeadError, ReplicaLostError, RequestError
from ulysses_infer.server.client import EngineClient
from ulysses_infer.server.messages import NewToken, Refused, Stepped, StepReport, Submit
from ulysses_infer.server.observe import Observatory

pytest.importorskip("ray.serve", reason='Ray is not installed: pip install "ulysses_infer[ray]"')


WAIT = "wait"


class Replicas:
    """A deployment handle. Each attempt of a request takes the next script: numbers are tokens, errors are raised."""

    def __init__(self, *scripts):
        from ulysses_infer.ray.replica import ReplicaReport

        self._scripts = list(scripts)
        self.reports = [ReplicaReport("r0", READY, STATE), EngineDeadError("gone")]
        self.metrics, self.asked = [], []
        self.commands = {"stats": [{"steps": 1}], "abort_all": [{"aborted": ["a"]}, {"aborted": ["b"]}]}
        self.tried, self.cancelled = [], 0
        self.generate = SimpleNamespace(remote=self._generate)

    def options(self, stream):
        assert stream
        return self

    def _generate(self, request):
        self.tried.append(list(request.tried))
        request.tried.append(f"r{len(self.tried) - 1}")
        return _Response(self, request.submit.request_id, self._scripts.pop(0))

    def broadcast(self, method, *arguments):
        self.asked.append((method, *arguments))
        results = {"report": self.reports, "metrics": self.metrics}.get(method) or self.commands[arguments[0]]

        async def results_async(timeout_s, return_exceptions):
            return results

        return SimpleNamespace(results_async=results_async)


class _Response:
    def __init__(self, replicas, request_id, script):
        self._replicas, self._id, self._script = replicas, request_id, iter(script)

    def __aiter__(self):
        return self

    async def __anext__(self):
        from ulysses_infer.ray.replica import _encoder

        step = next(self._script, None)
        if step is None:
            raise StopAsyncIteration
        if isinstance(step, Exception):
            raise step
        if step == WAIT:
            await asyncio.Event().wait()
        if isinstance(step, Refused):
            return _encoder.encode(step)
        return _encoder.encode(Stepped(STATE, None, [NewToken(self._id, 0, step, "stop" if step == 9 else None)]))

    def cancel(self):
        self._replicas.cancelled += 1


class Events:
    """An observer that keeps the finish reasons."""

    def __init__(self):
        self.finished = []

    def on_finish(self, record):
        self.finished.append(record.finish_reason)

    def __getattr__(self, name):
        return lambda *arguments: None


def run(replicas, use, events=None):
    """Run `use(client, events)` against these replicas."""
    events = events or Events()

    async def main():
        from ulysses_infer.ray.remote_engine import RemoteEngine

        ours, theirs = socket.socketpair()
        client = EngineClient(*await asyncio.open_connection(sock=ours), events)
        engine = RemoteEngine(replicas, *await asyncio.open_connection(sock=theirs))
        tasks = [asyncio.create_task(client.listen()), asyncio.create_task(engine.run())]
        await client.settled.wait()
        try:
            return await use(client, events)
        finally:
            for task in tasks:
                task.cancel()

    return asyncio.run(main())


async def tokens_of(client, events):
    batches = client.generate(Submit("id", [1, 2], {}))
    return [token.token_id async for batch in batches for token in batch]


def test_a_request_whose_replica_is_lost_before_its_first_token_runs_elsewhere():
    replicas = Replicas([EngineDeadError("gone")], [4, 9])
    assert run(replicas, tokens_of) == [4, 9]
    assert replicas.tried == [[], ["r0"]]


def test_a_request_whose_replica_is_lost_later_ends_with_a_retriable_error_that_names_it():
    replicas = Replicas([4, EngineDeadError("gone")])

    async def use(client, events):
        with pytest.raises(ReplicaLostError, match="replica r0, which ran the request, was lost: gone; send"):
            await tokens_of(client, events)
        return events.finished

    assert run(replicas, use) == ["error"]


def test_a_refusal_is_the_clients_error():
    with pytest.raises(RequestError, match="too long"):
        run(Replicas([Refused("id", "too long", "invalid")]), tokens_of)


def test_a_client_that_leaves_cancels_its_request_on_the_replica():
    replicas = Replicas([4, WAIT])

    async def use(client, events):
        batches = client.generate(Submit("id", [1, 2], {}))
        await anext(batches)
        await batches.aclose()
        await asyncio.sleep(0.1)

    run(replicas, use)
    assert replicas.cancelled == 1


def test_commands_run_on_every_replica_unless_later_ones_would_not_have_their_effect():
    async def use(client, events):
        with pytest.raises(RequestError, match="load_lora_adapter is not available on Ray"):
            await client.call("load_lora_adapter", lora_name="x")
        return await client.call("stats"), await client.call("abort_all")

    assert run(Replicas(), use) == ({"steps": 1}, {"aborted": ["a", "b"]})


def replica_metrics(name, num_running):
    """The families of a replica that runs this many requests and has run one step."""
    observatory = Observatory(Config(), labels={"replica": name})
    observatory.on_ready(READY)
    observatory.on_step(structs.replace(STATE, num_running=num_running), StepReport(1, 0.0, 0.1, (2, 1), 7, 0, {}))
    return pickle.loads(pickle.dumps(observatory._metrics.engine_families()))


def test_one_scrape_has_the_metrics_of_all_replicas_and_of_the_ingress():
    replicas = Replicas()
    replicas.metrics = [replica_metrics("r0", 2), EngineDeadError("gone"), replica_metrics("r2", 3)]

    async def use(client, events):
        from ulysses_infer.ray.metrics import IngressObservatory
        from ulysses_infer.ray.remote_engine import RemoteEngine

        ours, _ = socket.socketpair()
        engine = RemoteEngine(replicas, *await asyncio.open_connection(sock=ours))
        observatory = IngressObservatory(Config(), engine.metrics)
        observatory.on_ready(READY)
        observatory._metrics.on_http("GET", "/health", 200, 0.1)
        return await observatory.scrape()

    text = run(replicas, use).decode()
    lines = text.splitlines()
    assert len({line for line in lines if line.startswith("# TYPE")}) == sum(
        line.startswith("# TYPE") for line in lines
    )
    found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found.setdefault(sample.name, {})[sample.labels.get("replica")] = sample.value
    assert found["ulysses:num_requests_running"] == {"r0": 2, "r2": 3}
    assert found["ulysses:tokens_total"] == {"r0": 7, "r2": 7}
    assert found["ulysses:engine_up"] == {"r0": 1, "r2": 1}
    assert found["ulysses:http_requests_total"] == {None: 1}


class Recorder(Events):
    """An observer that keeps the steps, with the time at which each was told of."""

    def __init__(self):
        super().__init__()
        self.steps = []

    def on_step(self, state, step):
        if step is not None:
            self.steps.append((time.monotonic(), step))


def test_the_dashboard_gets_the_steps_of_all_replicas_once_and_in_the_order_of_time(monkeypatch):
    from ulysses_infer.ray import remote_engine
    from ulysses_infer.ray.replica import ReplicaReport

    def step(number, started):
        return StepReport(number, started, 0.1, (2, 1), 7, 0, {})

    monkeypatch.setattr(remote_engine, "REPORT_SECONDS", 0.01)
    replicas = Replicas()
    replicas.reports = [ReplicaReport("r0", READY, STATE, [], 4), ReplicaReport("r1", READY, STATE, [], 4)]
    events = Recorder()

    async def use(client, events):
        later = [
            ReplicaReport("r0", READY, STATE, [step(5, -0.9), step(6, -0.3)], 6),
            ReplicaReport("r1", READY, STATE, [step(5, -0.6)], 5),
        ]
        replicas.reports = later
        while not events.steps:
            await asyncio.sleep(0.001)
        for report in later:
            report.steps = []
        asked = len(replicas.asked)
        while len(replicas.asked) < asked + 2:
            await asyncio.sleep(0.001)

    run(replicas, use, events)
    assert [step.sequence for _, step in events.steps] == [5, 5, 6]
    ages = [told - step.started for told, step in events.steps]
    assert ages == pytest.approx([0.9, 0.6, 0.3], abs=0.2)
    assert replicas.asked[0] == ("report", {})
    assert replicas.asked[1] == ("report", {"r0": 4, "r1": 4})
    assert replicas.asked[-1] == ("report", {"r0": 6, "r1": 5})


def test_a_replica_reports_the_steps_that_the_ingress_has_not_seen(monkeypatch):
    from ulysses_infer.ray import metrics

    monkeypatch.setattr(metrics, "_RayMetrics", lambda: SimpleNamespace(take=lambda state, step: None))
    observatory = metrics.ReplicaObservatory(Config(), "r0")
    assert (observatory.last_step, observatory.steps_after(-1)) == (-1, [])
    observatory.on_ready(READY)
    for number in range(3):
        observatory.on_step(STATE, StepReport(number, 1e9, 0.5, (1, 2), 1, 1, {}))  # by the clock of another node
    found = observatory.steps_after(0)
    assert observatory.last_step == 2
    assert [step.sequence for step in found] == [1, 2]
    assert all(-1.0 < step.started <= -0.5 for step in found)
