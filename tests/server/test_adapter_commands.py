"""LoRA adapters loaded and unloaded by commands, while requests run, with a real engine of one rank."""

import asyncio

import pytest

from tests.model.lora.test_adapters import adapted  # noqa: F401
from tests.server.test_control import tokens_of
from tests.server.test_engine_loop import served, until
from tests.tiny import settings
from ulysses_infer.config import load_config
from ulysses_infer.engine.engine import Engine
from ulysses_infer.errors import RequestError
from ulysses_infer.job.prompt_reader import make_prompt_reader
from ulysses_infer.job.start_rank import finish_start, start_rank
from ulysses_infer.server.messages import Submit
from ulysses_infer.text.prompts import load_tokenizer

GREEDY = {"temperature": 0.0, "max_tokens": 9, "ignore_eos": True}


async def collect(client, name, prompt, adapter):
    submit = Submit(name, prompt, GREEDY, 0, "", adapter)
    return tokens_of([token async for batch in client.generate(submit, 1) for token in batch])


def test_adapters_come_and_go_while_requests_run(adapted):  # noqa: F811
    folder, folders, answers = adapted
    config = load_config(None, {"model.path": folder, **settings(**{"lora.runtime_bytes": 1 << 20})})
    rank = start_rank(config)
    prompts = make_prompt_reader(config, rank, load_tokenizer(config.model, rank.folder))
    engine = finish_start(rank, config, lambda: Engine(config, rank, prompts, text=False))[0]
    prompt = answers[None].prompts[0]

    async def case():
        async with served(engine) as (client, _, _, _):
            plain = asyncio.create_task(collect(client, "plain", prompt, None))
            await until(lambda: client.state.num_running == 1)
            await client.call("load_lora_adapter", lora_name="a", lora_path=folders["wide"])
            adapted = asyncio.create_task(collect(client, "adapted", prompt, "a"))
            with pytest.raises(RequestError, match="an adapter 'a' is loaded"):
                await client.call("load_lora_adapter", lora_name="a", lora_path=folders["narrow"])
            with pytest.raises(RequestError, match="has no adapter_config"):
                await client.call("load_lora_adapter", lora_name="b", lora_path=folder)
            await client.call("unload_lora_adapter", lora_name="a")
            with pytest.raises(RequestError, match="adapter 'a' is not loaded"):
                await collect(client, "late", prompt, "a")
            assert await plain == answers[None].tokens[0]
            assert await adapted == answers["wide"].tokens[0]

    asyncio.run(case())
