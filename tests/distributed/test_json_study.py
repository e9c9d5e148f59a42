"""In a comparison of JSON with and without speculation, neither contender finds what the other has cached."""

from itertools import pairwise

import pytest

from benchmarks.compare_speculation import NONE, Speculations
from benchmarks.json_output import AT_ONCE, JsonStudy, write
from tests.tiny import settings, tiny_llama
from ulysses_infer import init_inference

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    """Its steps hold the prompts of a round, which share the blocks of their example within the step."""
    folder = tmp_path_factory.mktemp("llama")
    tiny_llama(folder, max_position_embeddings=2048)
    changes = {"cache.num_blocks": 2048, "scheduler.max_num_batched_tokens": 8192, "speculation.method": "ngram"}
    with init_inference(str(folder), **settings(**changes)) as started:
        yield started


def test_no_contender_finds_prompts_that_another_has_cached(engine):
    stats, study, turns, hits = (
        engine._engine.scheduler.allocator.prefix_stats,
        JsonStudy(2 * AT_ONCE, {AT_ONCE: 2}),
        [],
        [],
    )
    speculations = Speculations(engine)

    def speculate(chosen: bool) -> None:
        turns.append(chosen)
        hits.append(stats.hits)
        speculations.use("ngram" if chosen else NONE)

    study.run(engine, speculate, lambda: False)
    hits.append(stats.hits)
    assert turns == [False, True, True, False]
    found = [after - before for before, after in pairwise(hits)]
    assert found[0] == found[1]
    assert found[2] == found[3]
    assert f"{2 * AT_ONCE} of {2 * AT_ONCE} valid" in study.lines()[0]
    write(engine, range(AT_ONCE, 2 * AT_ONCE))  # the round of the last turn again, without a new turn
    assert stats.hits - hits[-1] > found[-1]
