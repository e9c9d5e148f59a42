"""In a comparison of JSON with and without speculation, neither contender finds what the other has cached."""

import pytest

from benchmarks.compare_speculation import NONE, Speculations
from benchmarks.json_output import AT_ONCE, JsonStudy, write
from tests.tiny import settings, tiny_llama
from ulysses_infer import init_inference

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    """Its steps hold the prompts of a round: requests of the same round share nothing, either."""
    folder = tmp_path_factory.mktemp("llama")
    tiny_llama(folder, max_position_embeddings=2048)
    changes = {"cache.num_blocks": 2048, "scheduler.max_num_batched_tokens": 8192, "speculation.method": "ngram"}
    with init_inference(str(folder), **settings(**changes)) as started:
        yield started


def test_no_contender_finds_cached_prompts(engine):
    stats, study, turns = engine._engine.scheduler.allocator.prefix_stats, JsonStudy(2 * AT_ONCE), []
    speculations = Speculations(engine)

    def speculate(chosen: bool) -> None:
        turns.append(chosen)
        speculations.use("ngram" if chosen else NONE)

    study.run(engine, speculate, lambda: False)
    assert turns == [False, True, True, False]
    assert stats.queries > 0
    assert stats.hits == 0
    assert f"{2 * AT_ONCE} of {2 * AT_ONCE} valid" in study.lines()[0]
    write(engine, range(AT_ONCE, 2 * AT_ONCE))  # the round of the last turn again, without a new turn
    assert stats.hits > 0
