"""Rank 0's loop and the client of the HTTP process over a real socket, with a real engine of one rank."""

import asyncio
import contextlib
import random
import socket
import threading

import pytest

from tests.tiny import settings
from ulysses_infer.config import load_config
from ulysses_infer.engine.engine import Engine
from ulysses_infer.errors import EngineDeadError, OverloadedError, RequestError
from ulysses_infer.job.prompt_reader import make_prompt_reader
from ulysses_infer.job.start_rank import finish_start, start_rank
from ulysses_infer.job.watchdog_server import WatchdogServer
from ulysses_infer.server.client import EngineClient
from ulysses_infer.server.engine_loop import EngineLoop, describe_engine
from ulysses_infer.server.link import Link
from ulysses_infer.server.messages import Submit
from ulysses_infer.text.prompts import load_tokenizer

PROMPT = list(range(5, 25))
LONG = {"max_tokens": 100, "ignore_eos": True, "temperature": 0}
SHORT = {"max_tokens": 5, "ignore_eos": True, "temperature": 0}


class Log:
    """An observer that keeps every event."""

    def __init__(self):
        self.steps, self.finished, self.gaps, self.dead = [], [], 0, []

    def on_ready(self, info):
        self.info = info

    def on_step(self, state, step):
        self.steps.append((state, step))

    def on_first_token(self, record):
        pass

    def on_tokens(self, record, seconds):
        self.gaps += 1

    def on_finish(self, record):
        self.finished.append(record)

    def on_draining(self, deadline):
        pass

    def on_dead(self, reason):
        self.dead.append(reason)


@pytest.fixture(scope="module")
def engine(folder):
    changes = {"scheduler.max_num_seqs": 4, "server.max_num_queued_requests": 3, "server.shutdown_timeout": 20.0}
    config = load_config(None, {"model.path": folder, **settings(**changes)})
    rank = start_rank(config)
    prompts = make_prompt_reader(config, rank, load_tokenizer(config.model, rank.folder))
    return finish_start(rank, config, lambda: Engine(config, rank, prompts, text=False))[0]


@contextlib.asynccontextmanager
async def served(engine, **changes):
    """(client, its log, the serving loop, the engine's thread)"""
    ours, theirs = socket.socketpair()
    watchdog = WatchdogServer("127.0.0.1", 5.0, 60.0)
    config = load_config(engine.config, {f"server.{key}": value for key, value in changes.items()})
    serving = EngineLoop(engine, Link(ours), watchdog, config.server)
    thread = threading.Thread(target=lambda: serving.run(describe_engine(engine, [1], serving.state())))
    thread.start()
    log = Log()
    reader, writer = await asyncio.open_connection(sock=theirs)
    client = EngineClient(reader, writer, log, config.server.stream_interval)
    listening = asyncio.create_task(client.listen())
    await client.settled.wait()
    try:
        yield client, log, serving, thread
    finally:
        serving.stop("the test is over")
        await asyncio.to_thread(thread.join)
        engine.abort_all()
        watchdog.leave(1.0)
        listening.cancel()
        assert engine.scheduler.allocator.num_used == 0


async def collect(client, name, params=SHORT, prompt=PROMPT, n=1):
    """Every token that comes of a request, and how many batches they came in."""
    request = Submit(name, prompt, {**params, "n": n})
    return [token for batch in [batch async for batch in client.generate(request, n)] for token in batch]


async def until(condition):
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.002)


def idle(client):
    return client.state.num_running == 0 and client.state.num_waiting == 0 and client.state.kv_cache_usage == 0


@pytest.mark.parametrize("n", [1, 3])
def test_tokens_come_in_order_with_one_ending_per_sequence(engine, n):
    async def case():
        async with served(engine) as (client, log, _, _):
            params = {**SHORT, "temperature": 1.0, "seed": 3, "logprobs": 2, "prompt_logprobs": 1}
            tokens = await collect(client, "a", params, n=n)
            assert client.num_requests == 0
            return tokens, log

    tokens, log = asyncio.run(case())
    assert [sum(token.index == index for token in tokens) for index in range(n)] == [5] * n
    assert [token.finish_reason for token in tokens if token.finish_reason] == ["length"] * n
    assert all(len(token.logprobs) in (2, 3) and token.logprobs[0][0] == token.token_id for token in tokens)
    starts = [token.start for token in tokens if token.start is not None]
    assert [start.prompt_logprobs[0] for start in starts] == [None]
    assert [len(start.prompt_logprobs) for start in starts] == [len(PROMPT)]
    (record,) = log.finished
    assert (record.num_output_tokens, record.finish_reason, record.num_prompt_tokens) == (5 * n, "length", len(PROMPT))
    assert record.arrival_time <= record.scheduled_time <= record.first_token_time <= record.finish_time
    assert log.gaps == 4 * n


def test_a_stream_interval_gathers_tokens_but_not_the_first_nor_the_last(engine):
    async def case():
        async with served(engine, stream_interval=8) as (client, _, _, _):
            return [len(batch) async for batch in client.generate(Submit("a", PROMPT, {**LONG, "max_tokens": 20}))]

    sizes = asyncio.run(case())  # [1, 8, 8, 3], unless this loop was held up and more had come by then
    assert sum(sizes) == 20
    assert 2 <= len(sizes) <= 4
    assert all(size >= 8 for size in sizes[1:-1])


def test_the_same_prompt_again_reads_the_prefix_cache(engine):
    async def case():
        async with served(engine) as (client, _, _, _):
            assert (await client.call("reset_prefix_cache")) == {"reset": True}
            first, second = await collect(client, "a"), await collect(client, "b")
            assert [token.token_id for token in first] == [token.token_id for token in second]
            return first[0].start.num_cached_tokens, second[0].start.num_cached_tokens

    assert asyncio.run(case()) == (0, 16)


def test_a_bad_request_fails_alone_and_leaves_nothing(engine):
    async def case():
        async with served(engine) as (client, log, _, _):
            good = asyncio.create_task(collect(client, "good", LONG))
            await until(lambda: client.state.num_running == 1)
            for params, prompt, words in [
                ({"temperature": -1}, PROMPT, "temperature is out of range"),
                ({"tempratur": 1}, PROMPT, "did you mean 'temperature'"),
                ({}, [], "empty"),
                ({}, [10**6], "outside the vocabulary"),
                ({"max_tokens": 5}, [1] * 128, "at most 128"),
            ]:
                with pytest.raises(RequestError, match=words):
                    await collect(client, "bad", params, prompt)
            with pytest.raises(RequestError, match="unknown command 'fly'"):
                await client.call("fly")
            assert len(await good) == 100
            assert [record.request_id for record in log.finished] == ["good"]

    asyncio.run(case())


def test_leaving_early_aborts_in_any_state_and_returns_the_blocks(engine):
    async def leave(client, name, generator):
        stream = client.generate(Submit(name, [generator.randrange(3, 99) for _ in range(60)], LONG))
        tokens = generator.choice([0, 0, 1, 2, 50, 99, 100])
        with contextlib.suppress(TimeoutError):
            async with contextlib.aclosing(stream), asyncio.timeout(generator.choice([0, 0.001, 0.01, 20])):
                async for batch in stream:
                    tokens -= len(batch)
                    if tokens <= 0:
                        break

    async def case():
        generator = random.Random(5)
        async with served(engine, max_num_queued_requests=1000) as (client, log, _, _):
            await asyncio.gather(*(leave(client, f"r{number}", generator) for number in range(150)))
            await until(lambda: idle(client))
            assert client.num_requests == 0
            assert len(log.finished) == 150
            assert len(await collect(client, "after")) == 5

    asyncio.run(case())
    assert not engine.requests.sequences
    assert not engine.requests._completions


def test_a_full_queue_turns_requests_away(engine):
    async def case():
        async with served(engine) as (client, _, _, _):
            tasks = [asyncio.create_task(collect(client, f"r{number}", LONG)) for number in range(12)]
            results = await asyncio.gather(*tasks, return_exceptions=True)
            refused = [result for result in results if isinstance(result, OverloadedError)]
            assert all("3 requests are waiting already" in str(error) for error in refused)
            assert all(len(result) == 100 for result in results if not isinstance(result, Exception))
            return len(refused)

    assert 12 - (4 + 3) >= asyncio.run(case()) >= 12 - 2 * (4 + 3)


def test_an_administrator_changes_the_policy_and_aborts(engine):
    async def case():
        async with served(engine) as (client, _, _, _):
            assert (await client.call("get_policy"))["name"] == "threshold"
            policy = await client.call("set_policy", name="static", settings={"mode": "tp"})
            available = ["static", "threshold", "adaptive"]
            assert policy == {"name": "static", "mode": [1, 1], "available": available, "modes": [[1, 1]]}
            with pytest.raises(RequestError, match="threshold_token'"):
                await client.call("set_policy", name="threshold", settings={"threshold_token": 1})
            await client.call("set_policy", name="threshold", settings={"threshold_tokens": 7})
            await until(lambda: client.state.policy.get("threshold_tokens") == 7)
            tasks = [asyncio.create_task(collect(client, name, LONG)) for name in "ab"]
            await until(lambda: client.state.num_running == 2)
            with pytest.raises(RequestError, match="no request 'c'"):
                await client.call("abort", request_id="c")
            assert (await client.call("abort", request_id="a")) == {"aborted": ["a"]}
            assert (await tasks[0])[-1].finish_reason == "abort"
            with pytest.raises(RequestError, match="requests are running"):
                await client.call("reset_prefix_cache")
            assert (await client.call("abort_all")) == {"aborted": ["b"]}
            assert (await tasks[1])[-1].finish_reason == "abort"
            assert (await client.call("stats"))["num_requests_running"] == 0

    asyncio.run(case())


def test_draining_answers_accepted_requests_and_refuses_new_ones(engine):
    async def case():
        async with served(engine) as (client, _, serving, thread):
            task = asyncio.create_task(collect(client, "a", LONG))
            await until(lambda: client.state.num_running == 1)
            serving.drain()
            await until(lambda: client.status == "draining")
            with pytest.raises(OverloadedError, match="shutting down"):
                await collect(client, "b")
            assert len(await task) == 100
            async with asyncio.timeout(10):
                await client.ended.wait()
                await asyncio.to_thread(thread.join)
            assert client.status == "draining"

    asyncio.run(case())


def test_draining_ends_at_its_limit_with_an_error_for_waiting_requests(engine):
    async def case():
        async with served(engine, shutdown_timeout=0.0) as (client, log, serving, thread):
            task = asyncio.create_task(collect(client, "a", LONG))
            await until(lambda: client.state.num_running == 1)
            serving.drain()
            with pytest.raises(EngineDeadError, match="after waiting 0 s"):
                await task
            await asyncio.to_thread(thread.join)
            assert client.death_expected
            assert [record.finish_reason for record in log.finished] == ["error"]

    asyncio.run(case())


def test_a_stop_is_reported_to_every_request_at_once(engine):
    async def case():
        async with served(engine) as (client, log, serving, _):
            tasks = [asyncio.create_task(collect(client, f"r{number}", LONG)) for number in range(6)]
            await until(lambda: client.state.num_running == 4)
            serving.stop("stopped")
            results = await asyncio.gather(*tasks, return_exceptions=True)
            assert {str(result) for result in results} == {"stopped"}
            with pytest.raises(EngineDeadError, match="stopped"):
                await client.call("stats")
            with pytest.raises(EngineDeadError, match="stopped"):
                await collect(client, "late")
            assert log.dead == ["stopped"]

    asyncio.run(case())


def test_steps_report_their_mode_tokens_and_state(engine):
    async def case():
        async with served(engine) as (client, log, _, _):
            await collect(client, "a", prompt=list(range(30, 90)))
            await until(lambda: idle(client))
            return log.steps

    steps = [(state, step) for state, step in asyncio.run(case()) if step is not None]
    assert [step.num_tokens for _, step in steps] == [32, 28, 1, 1, 1, 1]
    assert [step.num_decodes for _, step in steps] == [0, 0, 1, 1, 1, 1]
    assert {step.mode for _, step in steps} == {(1, 1)}
    assert [step.sequence for _, step in steps] == sorted(step.sequence for _, step in steps)
    assert [state.num_running for state, _ in steps] == [1] * 5 + [0]
