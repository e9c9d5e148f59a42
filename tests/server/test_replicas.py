"""Several replicas behind one server: the least loaded gets the next request, and the others outlive a dead one."""

import asyncio
import concurrent.futures
import contextlib
import socket
import time

import httpx
import pytest

from tests.server.job import Job
from ulysses_infer.config import Config, ModelConfig, ParallelConfig
from ulysses_infer.errors import EngineDeadError, ReplicaLostError, RequestError
from ulysses_infer.server.client import EngineClient
from ulysses_infer.server.frames import FrameReader, encode_frame
from ulysses_infer.server.http.errors import api_error
from ulysses_infer.server.messages import (
    Abort,
    AdminCall,
    Dead,
    Draining,
    EngineState,
    Goodbye,
    NewToken,
    Ready,
    Reply,
    Stepped,
    Submit,
    ToEngine,
)
from ulysses_infer.server.replicas import LeaderAcceptor, _config_of_replica, make_endpoint
from ulysses_infer.server.router import Router


class Silent:
    """An observer that keeps the merged states."""

    def __init__(self):
        self.states, self.dead, self.ready, self.finished, self.dead_replicas = [], [], [], [], {}

    def on_ready(self, info):
        self.ready.append(info)

    def on_step(self, state, step):
        self.states.append(state)

    def on_first_token(self, record):
        pass

    on_draining = on_first_token

    def on_finish(self, record):
        self.finished.append((record.request_id, record.finish_reason))

    def on_tokens(self, record, seconds):
        pass

    def on_dead(self, reason):
        self.dead.append(reason)

    def on_replica_dead(self, dead):
        self.dead_replicas = dict(dead)


def state(running=0, usage=0.0):
    return EngineState(running, 1, usage, 10, 5, 2, {"name": "static"})


class Replica:
    """The engine's end of one replica's connection."""

    def __init__(self, line):
        line.setblocking(False)
        self._line, self._frames, self.received = line, FrameReader(ToEngine), []

    def send(self, message):
        self._line.setblocking(True)
        self._line.sendall(encode_frame(message))
        self._line.setblocking(False)

    def start(self):
        self.send(Ready("m", 100, 99, [2], [(1, 1)], 10, 4, [5], state()))

    def give(self, request_id):
        self.send(Stepped(state(), None, [NewToken(request_id, 0, 6)]))

    def finish(self, request_id):
        self.send(Stepped(state(), None, [NewToken(request_id, 0, 7, "length")]))

    def listen(self):
        with contextlib.suppress(BlockingIOError):
            self.received += self._frames.feed(self._line.recv(1 << 16))
        return self.received

    def received_of(self, kind):
        return [message for message in self.listen() if isinstance(message, kind)]


def text_of(response):
    return response.json()["choices"][0]["text"]


@contextlib.asynccontextmanager
async def routed(count):
    """(router, its observer, the replicas), all ready."""
    observer = Silent()
    router = Router(observer, count)
    replicas, clients = [], []
    for index in range(count):
        ours, theirs = socket.socketpair()
        replicas.append(Replica(ours))
        clients.append(EngineClient(*await asyncio.open_connection(sock=theirs), router.observers[index]))
    tasks = [asyncio.create_task(client.listen()) for client in clients] + router.join(clients)
    assert router.status == "starting"
    for replica in replicas:
        replica.start()
    await router.settled.wait()
    yield router, observer, replicas
    for task in tasks:
        task.cancel()


async def collect(router, name, num_tokens=10, key=""):
    request = Submit(name, [5] * num_tokens, {}, cache_key=key)
    return [token async for batch in router.generate(request) for token in batch]


async def until(condition):
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.001)


def test_requests_go_to_the_least_loaded_replica():
    async def case():
        async with routed(3) as (router, _, replicas):
            sizes = [900, 10, 20, 30, 40]
            tasks = [asyncio.create_task(collect(router, f"r{i}", size)) for i, size in enumerate(sizes)]
            await until(lambda: sum(len(replica.received_of(Submit)) for replica in replicas) == 5)
            got = [[message.request_id for message in replica.received_of(Submit)] for replica in replicas]
            for replica, names in zip(replicas, got, strict=True):
                for name in names:
                    replica.finish(name)
            assert all(len(tokens) == 1 for tokens in await asyncio.gather(*tasks))
            return got

    assert asyncio.run(case()) == [["r0"], ["r1", "r3"], ["r2", "r4"]]


def test_requests_of_one_cache_key_go_to_the_same_replica_and_a_death_moves_its_keys_only():
    async def places(router, replicas):
        """The replica of each key, in two rounds."""
        for replica in replicas:
            replica.received.clear()
        names = [(f"{key} {round}", key) for key in "abcdefghijklmnopqrst" for round in (1, 2)]
        tasks = [asyncio.create_task(collect(router, name, 500, key)) for name, key in names]
        await until(lambda: sum(len(replica.received_of(Submit)) for replica in replicas) == len(names))
        found = {}
        for index, replica in enumerate(replicas):
            for message in replica.received_of(Submit):
                found.setdefault(message.cache_key, set()).add(index)
                replica.finish(message.request_id)
        await asyncio.gather(*tasks)
        assert all(len(each) == 1 for each in found.values())
        return {key: each.pop() for key, each in found.items()}

    async def case():
        async with routed(3) as (router, _, replicas):
            before = await places(router, replicas)
            assert set(before.values()) == {0, 1, 2}
            replicas[1].send(Dead("gone"))
            await until(lambda: router.status == "degraded")
            after = await places(router, replicas)
            assert {key: place for key, place in after.items() if before[key] != 1} == {
                key: place for key, place in before.items() if place != 1
            }
            assert set(after.values()) == {0, 2}

    asyncio.run(case())


def test_the_states_of_all_replicas_are_merged():
    async def case():
        async with routed(2) as (router, observer, replicas):
            assert [info.num_blocks for info in observer.ready] == [20]
            replicas[0].send(Stepped(state(running=3, usage=0.5)))
            replicas[1].send(Stepped(state(running=1, usage=0.1)))
            await until(lambda: observer.states[-1:] and observer.states[-1].num_running == 4)
            last = observer.states[-1]
            assert (last.num_waiting, last.kv_cache_usage) == (2, 0.3)
            assert (last.prefix_cache_queries, last.num_preemptions) == (20, 4)
            assert router.status == "ready"

    asyncio.run(case())


def test_commands_reach_the_replicas_that_they_concern():
    async def answer(replicas, values):
        for replica, value in zip(replicas, values, strict=True):
            await until(lambda replica=replica: replica.received_of(AdminCall))
            call = replica.received_of(AdminCall)[0]
            replica.received.clear()
            error = value if isinstance(value, str) else None
            replica.send(Reply(call.number, None if error else value, error))

    async def case():
        async with routed(2) as (router, _, replicas):
            task = asyncio.create_task(router.call("abort_all"))
            await answer(replicas, [{"aborted": ["a"]}, {"aborted": ["b"]}])
            assert await task == {"aborted": ["a", "b"]}
            task = asyncio.create_task(router.call("abort", request_id="b"))
            await answer(replicas, ["no request 'b'", {"aborted": ["b"]}])
            assert await task == {"aborted": ["b"]}
            task = asyncio.create_task(router.call("abort", request_id="c"))
            await answer(replicas, ["no request 'c'", "no request 'c' here"])
            with pytest.raises(RequestError, match="no request 'c' here"):
                await task
            task = asyncio.create_task(router.call("set_policy", name="static", mode="tp"))  # an argument called "name"
            await answer(replicas, [{"policy": "static"}] * 2)
            assert await task == {"policy": "static"}
            task = asyncio.create_task(router.call("stats"))
            await answer(replicas, [{"x": 1}, {"x": 2}])
            assert await task == {"replicas": [{"x": 1}, {"x": 2}]}

    asyncio.run(case())


def test_replicas_drain_together_and_end_together():
    async def case():
        async with routed(2) as (router, _, replicas):
            task = asyncio.create_task(collect(router, "a"))
            await until(lambda: replicas[0].received_of(Submit))
            replicas[1].send(Draining(1e9))
            await until(lambda: replicas[0].received_of(AdminCall))
            assert replicas[0].received_of(AdminCall)[0].name == "drain"
            replicas[0].send(Draining(1e9))
            await until(lambda: router.status == "draining")
            await asyncio.sleep(0.05)
            assert not replicas[1].received_of(Goodbye), "the first still has a request to answer"
            replicas[0].finish("a")
            assert len(await task) == 1
            await router.ended.wait()
            await until(lambda: all(replica.received_of(Goodbye) for replica in replicas))

    asyncio.run(case())


def test_requests_of_a_dead_replica_fail_if_they_had_tokens_and_run_on_another_if_not():
    async def case():
        async with routed(2) as (router, observer, replicas):
            tasks = {name: asyncio.create_task(collect(router, name)) for name in "abcd"}
            await until(lambda: [len(replica.received_of(Submit)) for replica in replicas] == [2, 2])
            replicas[1].give("b")
            replicas[1].send(Dead("rank 3 ended unexpectedly"))
            with pytest.raises(
                ReplicaLostError, match=r"replica 1, which ran .* rank 3 ended unexpectedly; send it again"
            ) as raised:
                await tasks["b"]
            answer = api_error(raised.value)
            assert (answer.status, answer.code, answer.headers) == (503, "replica_lost", {"Retry-After": "1"})
            await until(lambda: len(replicas[0].received_of(Submit)) == 3)
            for name in "acd":
                replicas[0].finish(name)
                assert len(await tasks[name]) == 1
            assert (router.status, router.death, observer.dead) == ("degraded", "", [])
            assert router.dead_replicas == observer.dead_replicas == {1: "rank 3 ended unexpectedly"}
            assert sorted(observer.finished) == [("a", "length"), ("b", "error"), ("c", "length"), ("d", "length")]
            assert (router.info.num_blocks, router.state.num_running) == (10, 0)
            assert not replicas[0].received_of(Abort)

    asyncio.run(case())


def test_a_dead_replica_gets_no_requests_or_commands_and_the_rest_drains_without_it():
    async def case():
        async with routed(3) as (router, _, replicas):
            replicas[0].send(Dead("gone"))
            await until(lambda: router.status == "degraded")
            tasks = [asyncio.create_task(collect(router, name)) for name in "ab"]
            await until(lambda: all(replica.received_of(Submit) for replica in replicas[1:]))
            call = asyncio.create_task(router.call("get_policy"))
            await until(lambda: replicas[1].received_of(AdminCall))
            replicas[1].send(Reply(replicas[1].received_of(AdminCall)[0].number, {"name": "static"}))
            assert await call == {"name": "static"}
            with pytest.raises(RequestError, match=r"replica 0 is dead \(gone\) and cannot join; restart"):
                await router.call("init_weight_transfer_engine", master_address="x", master_port=1, world_size=4)
            for replica, name in zip(replicas[1:], "ab", strict=True):
                replica.send(Draining(1e9))
                replica.finish(name)
            await asyncio.gather(*tasks)
            await router.ended.wait()
            await until(lambda: all(replica.received_of(Goodbye) for replica in replicas[1:]))
            assert not replicas[0].received

    asyncio.run(case())


def test_a_command_for_all_replicas_leaves_out_one_that_dies_meanwhile():
    async def case():
        async with routed(2) as (router, _, replicas):
            call = asyncio.create_task(router.call("reset_prefix_cache"))
            await until(lambda: all(replica.received_of(AdminCall) for replica in replicas))
            replicas[0].send(Dead("gone"))
            replicas[1].send(Reply(replicas[1].received_of(AdminCall)[0].number, {"reset": True}))
            assert await call == {"reset": True}
            assert (await asyncio.gather(router.call("stats"), answer_stats(replicas[1])))[0] == {
                "replicas": [{"dead": "gone"}, {"x": 1}]
            }

    async def answer_stats(replica):
        await until(lambda: len(replica.received_of(AdminCall)) == 2)
        replica.send(Reply(replica.received_of(AdminCall)[1].number, {"x": 1}))

    asyncio.run(case())


def test_the_death_of_the_last_replica_is_that_of_the_engine():
    async def case():
        async with routed(2) as (router, observer, replicas):
            task = asyncio.create_task(collect(router, "a"))
            await until(lambda: replicas[0].received_of(Submit))
            replicas[1].send(Dead("rank 3 ended unexpectedly"))
            await until(lambda: router.status == "degraded")
            replicas[0].send(Dead("rank 1 ended unexpectedly"))
            with pytest.raises(EngineDeadError, match="rank 1 ended unexpectedly"):
                await task
            await router.ended.wait()
            assert (router.status, observer.dead) == ("dead", ["rank 1 ended unexpectedly"])
            with pytest.raises(EngineDeadError):
                await collect(router, "b")

    asyncio.run(case())


def test_connections_without_the_auth_token_are_refused():
    listener, endpoint = make_endpoint("127.0.0.1")
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(LeaderAcceptor(listener, endpoint.auth_token).accept, 2)
        strangers = [socket.create_connection((endpoint.host, endpoint.port)) for _ in range(2)]
        strangers[0].sendall(b"GET / HTTP/1.1\r\n\r\n")
        strangers[1].close()
        lines = [endpoint.connect(index) for index in (2, 1)]
        theirs = waiting.result(20)
    assert sorted(theirs) == [1, 2]
    lines[0].sendall(b"x")
    assert theirs[2].recv(1) == b"x"
    for line in [*lines, *theirs.values(), strangers[0]]:
        line.close()


def test_closing_the_acceptor_ends_the_wait_for_replicas():
    listener, endpoint = make_endpoint("127.0.0.1")
    acceptor = LeaderAcceptor(listener, endpoint.auth_token)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(acceptor.accept, 2)
        line = endpoint.connect(1)
        time.sleep(0.2)
        acceptor.close()
        assert sorted(waiting.result(5)) == [1]
        line.close()


def test_replicas_derive_different_seeds_from_the_seed_of_the_job():
    def seeds(seed):
        config = Config(model=ModelConfig(path="-", seed=seed), parallel=ParallelConfig(dp=2))
        return [_config_of_replica(config, index).model.seed for index in range(2)]

    assert seeds(None) == [None, None]
    first, second = seeds(7)
    assert first != second
    assert seeds(7) == [first, second]


@pytest.mark.distributed
def test_two_replicas_of_two_ranks_answer_alike_and_a_killed_rank_ends_only_its_own(long_folder):
    with Job(long_folder, dp=2, **{"cache.num_blocks": 2048}) as server:
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            texts = list(pool.map(lambda _: text_of(server.complete(max_tokens=30)), range(12)))
            drawn = list(pool.map(lambda _: text_of(server.complete(max_tokens=30, temperature=1)), range(6)))
            seeded = list(pool.map(lambda _: text_of(server.complete(max_tokens=30, temperature=1, seed=5)), range(6)))
        assert [len(set(each)) for each in (texts, drawn, seeded)] == [1, 6, 1]
        steps = [sum(mode["steps"] for mode in replica["modes"].values()) for replica in server.stats()["replicas"]]
        assert min(steps) > 30
        assert_others_outlive(server, killed=3, survivor=0)
        server.kept_rank(1).kill()
        server.assert_gone()
        assert server.exit_codes[0] == 1


def assert_others_outlive(server, killed, survivor):
    """Kill a rank under load: streams of its replica get an error, all other requests their result."""
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        streams = [server.stream(max_tokens=3000) for _ in range(4)]  # none may end before the kill
        whole = [pool.submit(server.complete, max_tokens=300) for _ in range(4)]
        time.sleep(0.05)
        server.kept_rank(killed).kill()
        texts = {text_of(each.result()) for each in whole}
        later = [server.complete(max_tokens=5) for _ in range(6)]
    for stream in streams:
        stream.join()
    lost = [stream for stream in streams if stream.errors]
    assert [stream.finish_reason for stream in streams if stream not in lost] == ["length"] * 2
    for stream in lost:
        error = stream.errors[0]["error"]
        assert (error["code"], f"replica {1 - survivor}" in error["message"]) == ("replica_lost", True)
    assert len(texts) == 1, "those of the dead replica ran again on the other"
    assert [answer.status_code for answer in later] == [200] * 6
    health = httpx.get(server.url + "/health")
    dead = health.json()["dead_replicas"]
    assert (health.status_code, health.json()["status"], len(dead)) == (200, "degraded", 1)
    assert dead[0]["replica"] == 1 - survivor
    assert server.status("/ready") == 200
    metrics = httpx.get(server.url + "/metrics").text
    assert 'ulysses:num_dead_replicas{model_name="tiny"} 1.0' in metrics


@pytest.mark.distributed
@pytest.mark.thorough
@pytest.mark.launcher
def test_under_deepspeeds_launcher_the_others_outlive_a_killed_first_rank_and_drain_in_order(long_folder):
    with Job(long_folder, sp=1, dp=2, how="ulysses-infer", **{"cache.num_blocks": 2048}) as server:
        assert_others_outlive(server, killed=0, survivor=1)
        server.assert_drains_at_a_signal()


@pytest.mark.distributed
@pytest.mark.thorough
@pytest.mark.parametrize(("fault", "reason"), [("raise:1:500", "a fault to order"), ("hang:1:500", "a step has taken")])
def test_a_replica_that_raises_or_hangs_ends_alone(long_folder, fault, reason):
    settings = {"cache.num_blocks": 2048, "runtime.step_timeout": 5}
    with Job(long_folder, sp=1, dp=2, fault=fault, **settings) as server:
        streams = [server.stream(max_tokens=1500) for _ in range(2)]
        for stream in streams:
            stream.join()
        assert sorted(bool(stream.errors) for stream in streams) == [False, True]
        assert reason in httpx.get(server.url + "/health").json()["dead_replicas"][0]["reason"]
        assert server.complete().status_code == 200


@pytest.mark.distributed
@pytest.mark.thorough
def test_replicas_of_one_rank_drain_and_end_in_order(long_folder):
    with Job(long_folder, sp=1, dp=2, **{"cache.num_blocks": 2048}) as server:
        streams = [server.stream(max_tokens=300) for _ in range(3)]
        server.rank(0).terminate()
        for stream in streams:
            stream.join()
            assert (stream.finish_reason, stream.done) == ("length", True)
        server.assert_gone()
        assert server.exit_codes == [0, 0]
