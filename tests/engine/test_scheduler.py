import pytest
from scheduler_simulation import prompt, shape, small_simulation

from ulysses_infer.cache.prefix import extend_block_hashes
from ulysses_infer.engine import request
from ulysses_infer.engine.request import RequestStatus

# --- what a step holds


def test_waiting_requests_start_in_order_of_arrival_within_the_token_budget():
    sim = small_simulation(max_num_batched_tokens=10)
    for first in range(3):
        sim.add(prompt(6, first), ignore_eos=True)
    assert shape(sim.step()) == {"r0": (0, 6), "r1": (0, 4)}
    assert shape(sim.step()) == {"r0": (6, 1), "r1": (4, 2), "r2": (0, 6)}


def test_decodes_go_on_beside_a_long_prompt_and_come_first():
    sim = small_simulation(max_num_batched_tokens=8)
    sim.add(prompt(3), ignore_eos=True)
    sim.step()
    sim.add(prompt(20, 1), ignore_eos=True)
    batches = [sim.step() for _ in range(4)]
    assert [shape(batch)["r0"] for batch in batches] == [(3, 1), (4, 1), (5, 1), (6, 1)]
    assert [shape(batch)["r1"] for batch in batches] == [(0, 7), (7, 7), (14, 6), (20, 1)]
    assert [item.samples for item in batches[1].scheduled] == [True, False]
    assert [item.samples for item in batches[2].scheduled] == [True, True]


def test_batch_counts_tokens_decodes_and_prefill_tokens():
    sim = small_simulation(max_num_batched_tokens=8)
    sim.add(prompt(3), ignore_eos=True)
    sim.step()
    sim.add(prompt(20, 1), ignore_eos=True)
    batch = sim.step()
    assert (batch.num_tokens, batch.num_decodes, batch.num_prefill_tokens) == (8, 1, 7)
    assert not batch.is_empty
    assert small_simulation().schedule().is_empty


def test_a_one_token_prompt_is_a_prefill_and_its_second_step_a_decode():
    sim = small_simulation()
    sim.add([1], ignore_eos=True)
    assert [sim.step().num_decodes for _ in range(2)] == [0, 1]


def test_no_more_than_max_num_seqs_run_at_once():
    sim = small_simulation(max_num_seqs=2)
    for first in range(3):
        sim.add(prompt(4, first), ignore_eos=True, max_tokens=2)
    assert list(shape(sim.step())) == ["r0", "r1"]
    assert (sim.scheduler.num_running, sim.scheduler.num_waiting) == (2, 1)
    assert list(shape(sim.step())) == ["r0", "r1"]
    assert list(shape(sim.step())) == ["r2"]


def test_a_later_request_never_overtakes_one_that_does_not_fit():
    sim = small_simulation(num_blocks=8)
    sim.add(prompt(16), ignore_eos=True, max_tokens=8)
    sim.add(prompt(24, 1), ignore_eos=True, max_tokens=1)
    sim.add(prompt(4, 2), ignore_eos=True, max_tokens=1)
    assert list(shape(sim.step())) == ["r0"]
    sim.run()


@pytest.mark.parametrize(("num_blocks", "running"), [(6, ["r0"]), (7, ["r0", "r1"])])
def test_admission_leaves_every_running_request_a_block_to_grow_into(num_blocks, running):
    sim = small_simulation(num_blocks=num_blocks)
    sim.add(prompt(12), ignore_eos=True, max_tokens=8)
    sim.add(prompt(12, 1), ignore_eos=True, max_tokens=1)
    assert list(shape(sim.step())) == running


def test_without_chunked_prefill_a_prompt_waits_until_it_fits_whole():
    sim = small_simulation(max_num_batched_tokens=10, enable_chunked_prefill=False)
    sim.add(prompt(6), ignore_eos=True)
    sim.add(prompt(10, 1), ignore_eos=True)
    sim.add(prompt(2, 2), ignore_eos=True)
    assert shape(sim.step()) == {"r0": (0, 6)}
    assert list(shape(sim.step())) == ["r0"]
    sim.scheduler.abort("r0")
    assert shape(sim.step()) == {"r1": (0, 10)}


def test_without_chunked_prefill_a_preempted_request_longer_than_a_step_still_ends():
    sim = small_simulation(num_blocks=6, caching=False, max_num_batched_tokens=8, enable_chunked_prefill=False)
    sim.add(prompt(6), ignore_eos=True, max_tokens=10)
    late = sim.add(prompt(6, 1), ignore_eos=True, max_tokens=10)
    sim.run()
    assert late.num_preemptions > 0


# --- prefix caching


def test_a_cached_prefix_is_not_computed_again():
    sim = small_simulation()
    sim.add(prompt(10), ignore_eos=True, max_tokens=1)
    sim.step()
    second = sim.add(prompt(10), ignore_eos=True, max_tokens=1)
    assert shape(sim.step()) == {"r1": (8, 2)}
    assert second.num_cached_tokens == 8
    assert (sim.allocator.prefix_stats.queries, sim.allocator.prefix_stats.hits) == (20, 8)


def test_admission_announces_the_whole_block_table():
    sim = small_simulation()
    first = sim.add(prompt(10), ignore_eos=True)
    sim.step()
    second = sim.add(prompt(10), ignore_eos=True)
    batch = sim.step()
    announced = batch.scheduled[-1].new_block_ids
    assert announced == second.block_tables[0]
    assert announced[:2] == first.block_tables[0][:2]
    assert announced[2] != first.block_tables[0][2]
    for _ in range(4):
        sim.step()
    assert len(second.block_tables[0]) > len(announced)  # the batch keeps what it announced


def test_a_prompt_entirely_in_the_cache_recomputes_its_last_block():
    sim = small_simulation()
    sim.add(prompt(8), ignore_eos=True, max_tokens=4)
    sim.run()
    sim.add(prompt(8), ignore_eos=True, max_tokens=4)
    assert shape(sim.step()) == {"r1": (4, 4)}


def test_output_tokens_are_cached_too():
    sim = small_simulation()
    first = sim.add(prompt(6), ignore_eos=True, max_tokens=8)
    sim.run()
    sim.add(first.prompt_token_ids + first.output_token_ids, ignore_eos=True)
    assert shape(sim.step()) == {"r1": (12, 2)}


def test_equal_prompts_of_one_step_are_computed_once():
    sim = small_simulation()
    first, *others = [sim.add(prompt(10), ignore_eos=True) for _ in range(3)]
    assert shape(sim.step()) == {"r0": (0, 10), "r1": (8, 2), "r2": (8, 2)}
    for other in others:
        assert other.block_tables[0][:2] == first.block_tables[0][:2]
        assert other.num_cached_tokens == 8
    sim.run()


def test_a_later_chunk_of_a_prompt_is_shared_only_after_its_step():
    sim = small_simulation(max_num_batched_tokens=10)
    sim.add(prompt(17), ignore_eos=True)
    assert shape(sim.step()) == {"r0": (0, 10)}
    sim.add(prompt(17), ignore_eos=True)
    assert shape(sim.step()) == {"r0": (10, 7), "r1": (8, 3)}
    sim.add(prompt(17), ignore_eos=True)
    assert shape(sim.step())["r2"][0] == 16


def test_blocks_of_a_request_aborted_during_its_step_are_shared_for_they_are_computed():
    sim = small_simulation()
    sim.add(prompt(10), ignore_eos=True)
    batch = sim.schedule()
    sim.scheduler.abort("r0")
    sim.finish_step(batch)
    sim.add(prompt(10), ignore_eos=True)
    assert shape(sim.step()) == {"r1": (8, 2)}


def test_requests_for_prompt_logprobs_compute_every_position():
    sim = small_simulation()
    sim.add(prompt(10), ignore_eos=True, max_tokens=1)
    sim.step()
    second = sim.add(prompt(10), ignore_eos=True, max_tokens=1, prompt_logprobs=0)
    assert shape(sim.step()) == {"r1": (0, 10)}
    assert second.num_cached_tokens == 0
    assert sim.allocator.prefix_stats.queries == 10


def test_requests_of_another_salt_share_nothing():
    sim = small_simulation()
    sim.add(prompt(10), salt="one", ignore_eos=True)
    sim.step()
    sim.add(prompt(10), salt="two", ignore_eos=True)
    sim.add(prompt(10), salt="one", ignore_eos=True)
    batch = shape(sim.step())
    assert (batch["r1"], batch["r2"]) == ((0, 10), (8, 2))


def test_a_long_prompt_is_hashed_once_however_long_it_waits(monkeypatch):
    hashed = []

    def spy(hashes, token_ids, block_size, salt):
        hashed.extend(token_ids)
        extend_block_hashes(hashes, token_ids, block_size, salt)

    monkeypatch.setattr(request, "extend_block_hashes", spy)
    sim = small_simulation(num_blocks=16, max_num_batched_tokens=7)
    sim.add(prompt(20), ignore_eos=True, max_tokens=12)
    sim.add(prompt(40, 1), ignore_eos=True, max_tokens=1)
    sim.run()
    assert len(hashed) == 28 + 40  # 20 + 12 - 1 computed tokens are 7 full blocks


# --- preemption


def crowd(**config):
    """Three requests that outgrow a cache of 8 blocks together."""
    sim = small_simulation(num_blocks=8, **config)
    requests = [sim.add(prompt(5, first), ignore_eos=True, max_tokens=16, priority=-first) for first in range(3)]
    return sim, requests


def test_the_youngest_is_preempted_and_the_oldest_never():
    sim, requests = crowd(policy="fcfs")
    order = [victim.index for _ in range(60) for victim in sim.step().preempted]
    assert order[0] == 2
    assert 0 not in order
    assert all(request.is_finished for request in requests)


def test_a_preempted_request_waits_first_and_keeps_its_output():
    sim, requests = crowd(policy="fcfs")
    late = sim.add(prompt(5, 3), ignore_eos=True)
    victim, output = requests[2], []
    while not victim.num_preemptions:
        output = list(victim.output_token_ids)
        sim.step()
    assert victim.output_token_ids == output != []
    assert (victim.status, victim.num_computed_tokens, victim.block_tables) == (RequestStatus.WAITING, 0, [])
    while victim.status is RequestStatus.WAITING:
        assert late.status is RequestStatus.WAITING
        sim.step()
    sim.run()


def test_a_preempted_request_finds_its_own_blocks_again():
    sim, requests = crowd(policy="fcfs")
    victim = requests[2]
    while not victim.num_preemptions:
        sim.step()
    sim.scheduler.abort("r0")
    item = next(item for item in sim.step().scheduled if item.request is victim)
    assert item.start > 0
    assert victim.num_cached_tokens == 0  # it counts what the first admission found


def test_the_lowest_priority_is_preempted_though_it_is_the_oldest():
    sim, requests = crowd(policy="priority")
    while not (batch := sim.step()).preempted:
        pass
    assert batch.preempted == [requests[0]]
    sim.run()


def test_of_equal_priorities_the_youngest_is_preempted():
    sim = small_simulation(num_blocks=8, policy="priority")
    requests = [sim.add(prompt(5, first), ignore_eos=True, max_tokens=16, priority=1) for first in range(3)]
    while not (batch := sim.step()).preempted:
        pass
    assert batch.preempted == [requests[2]]
    sim.run()


def test_a_request_taken_out_of_a_step_gives_back_its_tokens_and_blocks():
    sim = small_simulation(num_blocks=6, policy="priority", max_num_batched_tokens=6)
    low = sim.add(prompt(3), priority=1, ignore_eos=True, max_tokens=20)
    sim.step()
    high = sim.add(prompt(15, 1), priority=0, ignore_eos=True, max_tokens=8)
    batches = []
    while not low.num_preemptions:
        batches.append(sim.step())
    # `low` was scheduled first and took the last block that `high` then needed.
    assert batches[-1].preempted == [low]
    assert list(shape(batches[-1])) == ["r1"]
    assert low not in [item.request for item in batches[-1].scheduled]
    assert high.num_preemptions == 0
    sim.run()


def test_tokens_of_a_request_taken_out_of_a_step_serve_another_in_it():
    sim = small_simulation(num_blocks=5, policy="priority", max_num_batched_tokens=2)
    low = sim.add(prompt(1), priority=1, ignore_eos=True, max_tokens=12)
    sim.step()
    sim.add(prompt(1, 1), priority=0, ignore_eos=True, max_tokens=12)
    sim.step()
    sim.add(prompt(1, 2), priority=0, ignore_eos=True, max_tokens=1)  # no tokens are left for it
    while not low.num_preemptions:
        batch = sim.step()
    assert batch.preempted == [low]
    assert shape(batch) == {"r1": (8, 1), "r2": (0, 1)}
    sim.run()


# --- priority


def test_waiting_requests_start_by_priority_then_arrival():
    sim = small_simulation(policy="priority", max_num_seqs=1)
    for first, priority in enumerate([1, 0, 1, 0]):
        sim.add(prompt(4, first), priority=priority, ignore_eos=True, max_tokens=1)
    assert [list(shape(sim.step())) for _ in range(4)] == [["r1"], ["r3"], ["r0"], ["r2"]]


def test_fcfs_ignores_priority():
    sim = small_simulation(policy="fcfs", max_num_seqs=1)
    for first, priority in enumerate([1, 0]):
        sim.add(prompt(4, first), priority=priority, ignore_eos=True, max_tokens=1)
    assert [list(shape(sim.step())) for _ in range(2)] == [["r0"], ["r1"]]


def test_an_urgent_request_displaces_the_least_urgent_when_all_slots_are_taken():
    sim = small_simulation(policy="priority", max_num_seqs=2)
    low, _ = (sim.add(prompt(4, first), priority=2 - first, ignore_eos=True) for first in range(2))
    sim.step()
    sim.add(prompt(4, 2), priority=0, ignore_eos=True)
    batch = sim.step()
    assert batch.preempted == [low]
    assert list(shape(batch)) == ["r1", "r2"]
    sim.run()


def test_an_urgent_request_displaces_none_while_there_is_room():
    sim = small_simulation(policy="priority", max_num_seqs=3)
    sim.add(prompt(4), priority=2, ignore_eos=True)
    sim.step()
    sim.add(prompt(4, 1), priority=0, ignore_eos=True)
    batch = sim.step()
    assert batch.preempted == []
    assert list(shape(batch)) == ["r0", "r1"]


def test_an_equally_urgent_request_displaces_none():
    sim = small_simulation(policy="priority", max_num_seqs=1)
    sim.add(prompt(4), priority=1, ignore_eos=True)
    sim.step()
    sim.add(prompt(4, 1), priority=1, ignore_eos=True)
    assert sim.step().preempted == []


def test_an_urgent_request_that_would_not_fit_anyway_displaces_none():
    sim = small_simulation(num_blocks=8, policy="priority")
    sim.add(prompt(16), priority=0, ignore_eos=True, max_tokens=4)
    sim.add(prompt(4, 1), priority=2, ignore_eos=True, max_tokens=4)
    sim.step()
    sim.add(prompt(28, 2), priority=1, ignore_eos=True, max_tokens=4)
    assert sim.step().preempted == []
    sim.run()
