"""Pauses and new weights while requests run, with a real engine of one rank."""

import asyncio
import itertools
import threading

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.server.test_engine_loop import LONG, PROMPT, SHORT, collect, served, until
from tests.tiny import settings, tiny_llama
from ulysses_infer.config import load_config
from ulysses_infer.engine.engine import Engine
from ulysses_infer.errors import RequestError
from ulysses_infer.job.processes import free_port
from ulysses_infer.job.prompt_reader import make_prompt_reader
from ulysses_infer.job.start_rank import finish_start, start_rank
from ulysses_infer.job.weight_transfer import TRAINER, connect
from ulysses_infer.server.control import Control
from ulysses_infer.text.prompts import load_tokenizer

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two checkpoints of one shape."""
    made = [tmp_path_factory.mktemp(f"weights{number}") for number in (0, 1)]
    tiny_llama(made[0])
    other = tiny_llama(made[1])
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.copy_(parameter.flip(-1))
    other.save_pretrained(made[1])
    return made


@pytest.fixture
def engine(folders):
    config = load_config(None, {"model.path": str(folders[0]), "model.dtype": "float32", **settings()})
    rank = start_rank(config)
    prompts = make_prompt_reader(config, rank, load_tokenizer(config.model, rank.folder))
    return finish_start(rank, config, lambda: Engine(config, rank, prompts, text=False))[0]


def greedy(folder, token_ids, count):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    output = model.generate(torch.tensor([token_ids]), max_new_tokens=count, min_new_tokens=count, do_sample=False)
    return output[0, len(token_ids) :].tolist()


def tokens_of(news):
    return [token.token_id for token in news if token.token_id >= 0]


async def some_tokens(client, stream, count):
    """The first tokens of a stream that goes on."""
    tokens = []
    while len(tokens) < count:
        tokens += await anext(stream)
    return tokens


@pytest.mark.parametrize("clear_cache", [True, False])
def test_kept_requests_go_on_after_a_pause(engine, clear_cache):
    async def case():
        async with served(engine) as (client, _, _, _):
            alone = tokens_of(await collect(client, "alone", LONG))
            tasks = [asyncio.create_task(collect(client, name, LONG)) for name in "ab"]
            await until(lambda: client.state.num_running == 2)
            assert await client.call("pause", mode="keep", clear_cache=clear_cache) == {"is_paused": True}
            assert (engine.scheduler.allocator.num_used == 0) == clear_cache
            late = asyncio.create_task(collect(client, "late", LONG))
            steps = engine.stats.as_dict()
            await until(lambda: client.state.is_paused)
            await asyncio.sleep(0.05)
            assert engine.stats.as_dict() == steps
            await client.call("resume")
            assert [tokens_of(await task) for task in [*tasks, late]] == [alone] * 3

    asyncio.run(case())


def test_waiting_pauses_after_the_last_request_and_holds_new_ones(engine):
    async def case():
        async with served(engine) as (client, _, _, _):
            running = asyncio.create_task(collect(client, "a", LONG))
            await until(lambda: client.state.num_running == 1)
            assert await client.call("pause", mode="wait") == {"is_paused": False}
            held = asyncio.create_task(collect(client, "b", SHORT))
            assert len(await running) == LONG["max_tokens"]
            await until(lambda: client.state.is_paused)
            await asyncio.sleep(0.05)
            assert not held.done()
            await client.call("resume")
            assert len(await held) == SHORT["max_tokens"]

    asyncio.run(case())


def test_aborting_ends_what_runs_and_a_held_client_may_leave(engine):
    async def case():
        async with served(engine) as (client, _, _, _):
            running = asyncio.create_task(collect(client, "a", LONG))
            await until(lambda: client.state.num_running == 1)
            await client.call("pause", mode="abort")
            assert (await running)[-1].finish_reason == "abort"
            held = asyncio.create_task(collect(client, "b", LONG))
            await asyncio.sleep(0.02)
            held.cancel()
            await asyncio.gather(held, return_exceptions=True)
            await client.call("resume")
            await asyncio.sleep(0.05)
            assert client.state.num_running == 0
            with pytest.raises(RequestError, match="mode is 'stop'; use abort, wait, keep"):
                await client.call("pause", mode="stop")

    asyncio.run(case())


def broadcast(port, state):
    """The trainer: the weights in the order of `state`, on a thread."""

    def run():
        group = connect("127.0.0.1", port, TRAINER, 2, CPU, 60.0)
        for tensor in state.values():
            group.broadcast(tensor.clone(), TRAINER).wait()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread


def described(state):
    return {
        "names": list(state),
        "dtype_names": [str(tensor.dtype).removeprefix("torch.") for tensor in state.values()],
        "shapes": [list(tensor.shape) for tensor in state.values()],
    }


@pytest.mark.parametrize("in_parts", [False, True])
def test_kept_requests_go_on_with_the_weights_that_a_trainer_broadcasts(engine, folders, in_parts):
    state = AutoModelForCausalLM.from_pretrained(folders[1], dtype=torch.float32).state_dict()

    async def case():
        async with served(engine) as (client, _, _, _):
            port = free_port()
            trainer = broadcast(port, state)
            await client.call(
                "init_weight_transfer_engine",
                master_address="127.0.0.1",
                master_port=port,
                rank_offset=1,
                world_size=2,
            )
            await client.call("update_weight_version", new_version="one")
            running = asyncio.create_task(collect(client, "a", LONG))
            await until(lambda: client.state.num_running == 1)
            await client.call("pause", mode="keep")
            await client.call("start_weight_update")
            names = list(state)
            cuts = [0, len(names) // 2, len(names)] if in_parts else [0, len(names)]
            for start, end in itertools.pairwise(cuts):
                await client.call("update_weights", **described({name: state[name] for name in names[start:end]}))
            await client.call("finish_weight_update", weight_version="two")
            trainer.join(10)
            assert await client.call("weight_info") == {"weight_version": "two"}
            await client.call("resume")
            return await running, await collect(client, "b", SHORT)

    running, fresh = asyncio.run(case())
    assert {token.weight_version for token in running} == {"one", "two"}
    old = [token.token_id for token in running if token.weight_version == "one"]
    new = [token.token_id for token in running if token.weight_version == "two"]
    assert old == greedy(folders[0], PROMPT, len(old))
    assert new[:20] == greedy(folders[1], PROMPT + old, 20)
    assert fresh[0].start.num_cached_tokens == 0
    assert tokens_of(fresh) == greedy(folders[1], PROMPT, SHORT["max_tokens"])


def test_weights_come_from_a_folder_too(engine, folders):
    async def case():
        async with served(engine) as (client, _, _, _):
            await collect(client, "a", SHORT)
            await client.call("update_weights", path=str(folders[1]))
            return await collect(client, "b", SHORT)

    news = asyncio.run(case())
    assert news[0].start.num_cached_tokens == 0
    assert tokens_of(news) == greedy(folders[1], PROMPT, SHORT["max_tokens"])


def test_salts_of_different_weights_never_meet():
    control = Control.__new__(Control)
    salts = ["", "x", "0", "1 x", "0 x", " x", "1", "2 1 x"]
    seen = set()
    for control._num_updates in range(3):
        seen |= {control.salted(salt) for salt in salts}
    assert len(seen) == 3 * len(salts)


def test_a_wrong_update_is_refused_and_the_old_weights_stay(engine, folders):
    async def case():
        async with served(engine) as (client, _, _, _):
            before = tokens_of(await collect(client, "a", SHORT))
            for command, arguments, message in [
                ("finish_weight_update", {}, "no weight update is in progress"),
                ("update_weights", {"names": ["x"]}, "update_info has no list 'dtype_names'"),
                (
                    "update_weights",
                    {"names": ["x", "y", "x"], "dtype_names": ["float32"] * 3, "shapes": [[1]] * 3},
                    "has 'x' more than once",
                ),
                ("update_weights", {"path": str(folders[0] / "missing")}, "missing"),
                (
                    "init_weight_transfer_engine",
                    {"master_address": "x", "master_port": 1, "rank_offset": 1, "world_size": 1},
                    "needs at least 1 and 2",
                ),
            ]:
                with pytest.raises(RequestError, match=message):
                    await client.call(command, **arguments)
            await client.call("start_weight_update")
            with pytest.raises(RequestError, match="no process group with the trainer"):
                await client.call("update_weights", names=["x"], dtype_names=["float32"], shapes=[[1]])
            with pytest.raises(RequestError, match="lacks"):
                await client.call("finish_weight_update")
            running = asyncio.create_task(collect(client, "b", LONG))
            await until(lambda: client.state.num_running == 1)
            with pytest.raises(RequestError, match="pause the engine first"):
                await client.call("start_weight_update")
            assert tokens_of(await running)[: len(before)] == before

    asyncio.run(case())


def test_an_engine_sleeps_and_wakes_up(engine):
    async def case():
        async with served(engine) as (client, _, _, _):
            before = tokens_of(await collect(client, "a", SHORT))
            await client.call("sleep", level=1)
            assert await client.call("is_sleeping") == {"is_sleeping": True}
            with pytest.raises(RequestError, match="asleep"):
                await collect(client, "b", SHORT)
            await client.call("wake_up")
            assert tokens_of(await collect(client, "c", SHORT)) == before

    asyncio.run(case())


def test_a_trace_without_a_folder_is_refused(engine):
    async def case():
        async with served(engine) as (client, _, _, _):
            with pytest.raises(RequestError, match=r"runtime.profile_folder is not set; start with"):
                await client.call("start_profile")
            with pytest.raises(RequestError, match="no trace is being recorded"):
                await client.call("stop_profile")

    asyncio.run(case())
