"""Heavy load: a hundred streams, hundreds of clients that hang up, a cache too small for all of them.

One server of two ranks serves them all, changing the mode with every step, and loses no block or memory.
"""

import asyncio
import contextlib
import json
import random
import time

import pytest

from tests.server.job import Job
from tests.tiny import VOCABULARY

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def server(long_folder):
    """128 blocks of 4 tokens: a few dozen of the sequences below fill them. Steps are scheduled ahead, as on a GPU."""
    changes = {"server.max_num_queued_requests": 2000, "scheduler.async_scheduling": True}
    with Job(long_folder, fault="flip", **changes) as job:
        yield job


class Client:
    """One connection with one streamed completion on it."""

    def __init__(self, server, generator, max_tokens):
        self._server = server
        self.temperature = generator.choice([0, 1])
        prompt = "".join(generator.choice("abcdefgh ") for _ in range(generator.choice([1, 20, 100])))
        body = {"model": "tiny", "prompt": prompt, "max_tokens": max_tokens, "stream": True, "ignore_eos": True}
        body["temperature"] = self.temperature
        self._body = json.dumps(body).encode()

    async def start(self):
        self._reader, self._writer = await asyncio.open_connection("127.0.0.1", self._server.port)
        head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(self._body)}\r\n"
        self._writer.write(head.encode() + b"Content-Type: application/json\r\nConnection: close\r\n\r\n" + self._body)

    async def chunks(self):
        """Data lines as they come."""
        async for line in self._reader:
            if line.startswith(b"data: "):
                yield line[6:].strip()

    async def hang_up(self):
        self._writer.transport.abort()
        await asyncio.sleep(0)


async def read_all(client):
    """Everything a client gets: its tokens' texts, and how it ended."""
    await client.start()
    lines = [line async for line in client.chunks()]
    chunks = [json.loads(line) for line in lines if line != b"[DONE]"]
    await client.hang_up()
    return lines[-1:] == [b"[DONE]"], chunks


async def leave_early(server, generator, gate):
    """Send a request and hang up: at once, while queued, after some tokens, at the last one."""
    async with gate:
        client = Client(server, generator, max_tokens=generator.choice([1, 2, 40, 400]))
        await client.start()
        patience, limit = generator.choice([0, 1, 2, 5, 10**6]), generator.choice([0, 0.002, 0.02, 0.2, 1.0])
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(limit):
                async for _ in client.chunks():
                    patience -= 1
                    if patience <= 0:
                        break
        await client.hang_up()


def hang_up(server, number, seed):
    async def case():
        generator, gate = random.Random(seed), asyncio.Semaphore(48)
        await asyncio.gather(*(leave_early(server, generator, gate) for _ in range(number)))

    asyncio.run(case())
    wait_until_idle(server)


def wait_until_idle(server):
    deadline = time.monotonic() + 30
    while (stats := server.stats())["num_requests_running"] or stats["num_requests_waiting"]:
        assert time.monotonic() < deadline, stats
        time.sleep(0.05)
    assert stats["kv_cache_usage_perc"] == 0


def memory(server):
    """Bytes that each process holds for itself."""
    return [process.memory_full_info().uss for process in (server.rank(0), server.rank(1), server.http)]


@pytest.mark.parametrize("number", [100, pytest.param(1000, marks=pytest.mark.thorough)])
def test_clients_that_hang_up_leave_no_block_and_no_memory(server, number):
    hang_up(server, 100, seed=1)
    before = memory(server)
    hang_up(server, number, seed=2)
    after = memory(server)
    assert all(now - then < (2 << 20) + (number << 12) for then, now in zip(before, after, strict=True)), (
        before,
        after,
    )
    assert server.complete().status_code == 200
    modes = server.stats()["modes"]
    assert len(modes) == 2
    assert server.stats()["switches"] > 20


def test_many_streams_at_once_all_end_as_they_should(server):
    async def case():
        clients = [Client(server, random.Random(seed), max_tokens=8) for seed in range(120)]
        return await asyncio.gather(*map(read_all, clients))

    for done, chunks in asyncio.run(case()):
        assert done
        assert chunks[-1]["choices"][0]["finish_reason"] == "length"
        assert "error" not in json.dumps(chunks)
    wait_until_idle(server)


def test_requests_that_do_not_fit_together_all_complete(server):
    """Sixteen sequences of 60 blocks in a cache of 128: some are preempted, and all are right."""

    async def case(seeds):
        clients = [Client(server, random.Random(seed), max_tokens=220) for seed in seeds]
        return await asyncio.gather(*map(read_all, clients))

    preemptions = server.stats()["num_preemptions"]
    together = asyncio.run(case(range(16)))
    assert server.stats()["num_preemptions"] > preemptions
    assert all(done and chunks[-1]["choices"][0]["finish_reason"] == "length" for done, chunks in together)
    greedy = next(seed for seed in range(16) if Client(server, random.Random(seed), 220).temperature == 0)
    assert texts(asyncio.run(case([greedy]))) == texts([together[greedy]])
    wait_until_idle(server)


def texts(results):
    return ["".join(chunk["choices"][0]["text"] for chunk in chunks if chunk["choices"]) for _, chunks in results]


@pytest.mark.parametrize(
    "junk",
    [
        b"\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01",
        b"GET\r\n\r\n",
        b"POST /v1/completions HTTP/9.9\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: -5\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 999\r\n\r\n{",
        b"GET / HTTP/1.1\r\n" + b"a: b\r\n" * 9999,
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    ],
)
def test_junk_on_the_wire_does_not_affect_other_requests(server, junk):
    async def case():
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        with contextlib.suppress(ConnectionError):
            writer.write(junk)
            await writer.drain()
            writer.write_eof()
            async with asyncio.timeout(10):
                answer = await reader.read()
                assert b" 50" not in answer.split(b"\r\n")[0]
        writer.close()

    asyncio.run(case())
    assert server.complete().status_code == 200


def test_constraints_that_leave_no_token_are_the_requests_own_fault(server):
    answer = server.complete(allowed_token_ids=[40, 41], bad_words=[VOCABULARY[40], VOCABULARY[41]])
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "no_token_allowed")
    assert server.complete(allowed_token_ids=[40, 41], bad_words=[VOCABULARY[40]]).status_code == 200
