"""What the HTTP process learns of the tier below the cache, over a real socket, from one replica and from several."""

import asyncio

import pytest

from tests.server.test_engine_loop import collect, served
from tests.tiny import settings
from ulysses_infer.config import load_config
from ulysses_infer.engine.engine import Engine
from ulysses_infer.job.prompt_reader import make_prompt_reader
from ulysses_infer.job.start_rank import finish_start, start_rank
from ulysses_infer.server.router import combined_state
from ulysses_infer.text.prompts import load_tokenizer

TIGHT = {"cache.num_blocks": 10, "model.max_model_len": 40, "cache.offload_host_bytes": 1 << 16}


@pytest.mark.thorough
def test_counts_of_offloaded_blocks_reach_the_http_process(folder):
    config = load_config(None, {"model.path": folder, **settings(**TIGHT)})
    rank = start_rank(config)
    prompts = make_prompt_reader(config, rank, load_tokenizer(config.model, rank.folder))
    engine = finish_start(rank, config, lambda: Engine(config, rank, prompts, text=False))[0]

    async def case():
        async with served(engine) as (client, _, _, _):
            for number in range(4):  # two prompts in turn; the cache holds one and a half
                first = 5 + number % 2
                cached = (await collect(client, f"{number}", prompt=list(range(first, first + 24))))[0]
                assert cached.start.num_cached_tokens == (20 if number > 1 else 0)
            return client.state

    state = asyncio.run(case())
    tier, block = engine.scheduler.allocator.tier, rank.worker.cache.shape.bytes_per_block
    assert (state.offload.num_queries, state.offload.num_hits) == (tier.stats.queries, tier.stats.hits)
    assert 0 < state.offload.num_hits == state.offload.loaded_bytes // block * 4
    assert (state.offload.stored_bytes, state.offload.host_usage) == (tier.stored_bytes, tier.host_usage)
    both = combined_state([state, state, state]).offload
    assert both.num_hits == 3 * state.offload.num_hits
    assert both.stored_bytes == 3 * state.offload.stored_bytes
    assert both.host_usage == pytest.approx(state.offload.host_usage)
