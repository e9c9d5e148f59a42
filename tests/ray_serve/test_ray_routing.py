"""The choice of replicas and of their number, without a cluster."""

from types import SimpleNamespace

from hypothesis import given, settings
from hypothesis import strategies as st

from ulysses_infer.ray.autoscaling import OUTSTANDING_TOKENS, OutstandingTokensPolicy
from ulysses_infer.ray.choice import Candidate, preferred
from ulysses_infer.ray.prefix_index import PrefixIndex
from ulysses_infer.ray.rank_actor import RankPlace, environment_of
from ulysses_infer.server.messages import Submit

candidates = st.lists(
    st.builds(
        Candidate,
        st.uuids().map(str),
        st.integers(0, 100),
        st.integers(0, 1000),
        st.floats(0, 1),
        st.integers(0, 9),
        st.booleans(),
    ),
    max_size=6,
    unique_by=lambda candidate: candidate.replica,
)


@settings(max_examples=25, deadline=None)
@given(candidates, st.none() | st.integers(0, 500))
def test_every_replica_is_asked_once_and_tried_ones_last(found, balance):
    order = preferred(found, balance)
    assert sorted(order) == sorted(each.replica for each in found)
    tried = {each.replica: each.was_tried for each in found}
    assert [tried[name] for name in order] == sorted(tried.values())


def test_longest_prefix_wins_then_load_then_usage_then_fewest_blocks():
    a, b = Candidate("a", 32, 200), Candidate("b", 16, 0)
    assert preferred([b, a], 500) == ["a", "b"]
    assert preferred([b._replace(num_cached_tokens=32), a], 500) == ["b", "a"]
    same = [Candidate("c", 0, 5, 0.5), Candidate("d", 0, 5, 0.1, 7), Candidate("e", 0, 5, 0.1, 3)]
    assert preferred(same, 500) == ["e", "d", "c"]


def test_a_replica_far_above_the_least_loaded_is_passed_over():
    a, b = Candidate("a", 320, 501), Candidate("b", 0, 0)
    assert preferred([a, b], 500) == ["b", "a"]
    assert preferred([a._replace(outstanding_tokens=500), b], 500) == ["a", "b"]


def test_without_prefixes_the_least_loaded_is_first():
    assert preferred([Candidate("a", 320, 2), Candidate("b", 0, 1)], None) == ["b", "a"]


def test_a_cache_key_goes_to_its_own_replica_before_any_prefix():
    a, b = Candidate("a", 320, 0, affinity=b"1"), Candidate("b", 0, 9, affinity=b"2")
    assert preferred([a, b], 500) == ["b", "a"]
    assert preferred([a, b._replace(was_tried=True)], 500) == ["a", "b"]


def prompt(*tokens, **more):
    return Submit("id", list(tokens), {}, **more)


def test_prefixes_are_matched_in_whole_blocks_per_replica_adapter_and_salt():
    index = PrefixIndex(2)
    index.add("a", index.hashes_of(prompt(1, 2, 3, 4, 5)), 100)

    def cached(replica, submit):
        return index.num_cached_tokens(replica, index.hashes_of(submit))

    assert cached("a", prompt(1, 2, 3, 4, 9, 9)) == 4
    assert cached("a", prompt(1, 2, 9, 4)) == 2
    assert cached("b", prompt(1, 2, 3, 4)) == 0
    assert cached("a", prompt(1, 2, 3, 4, adapter="x")) == 0
    assert cached("a", prompt(1, 2, 3, 4, cache_salt="x")) == 0


def test_a_replica_remembers_as_much_as_its_cache_holds_and_nothing_once_it_is_gone():
    index = PrefixIndex(1)
    old, new = index.hashes_of(prompt(1, 2, 3)), index.hashes_of(prompt(7, 8))
    index.add("a", old, 4)
    index.add("a", new, 4)
    assert index.num_blocks("a") == 4
    assert (index.num_cached_tokens("a", old), index.num_cached_tokens("a", new)) == (2, 2)
    index.keep({"b"})
    assert index.num_cached_tokens("a", new) == 0


def test_the_number_of_replicas_follows_their_outstanding_tokens():
    policy = OutstandingTokensPolicy(100)
    assert policy(SimpleNamespace(aggregated_metrics={OUTSTANDING_TOKENS: {"a": 150.0, "b": 60.0}})) == (3, {})
    assert policy(SimpleNamespace(aggregated_metrics=None)) == (0, {})


def test_ranks_of_a_node_see_the_gpus_of_all_of_them():
    places = [RankPlace("n0", "10.0.0.1", ["3"], 1), RankPlace("n0", "10.0.0.1", ["1"], 2)]
    places += [RankPlace("n1", "10.0.0.2", ["0"], 3)]
    environments = [environment_of(rank, places) for rank in range(3)]
    assert [each["CUDA_VISIBLE_DEVICES"] for each in environments] == ["3,1", "3,1", "0"]
    assert [(each["LOCAL_RANK"], each["LOCAL_WORLD_SIZE"]) for each in environments] == [
        ("0", "2"),
        ("1", "2"),
        ("0", "1"),
    ]
    assert {(each["MASTER_ADDR"], each["MASTER_PORT"]) for each in environments} == {("10.0.0.1", "1")}
