"""When states are saved and found again: chunks end where a snapshot is useful, and a hit has one."""

from scheduler_simulation import prompt, shape, small_simulation


def simulation(**options):
    return small_simulation(**{"snapshots": 8, "snapshot_blocks": 2, **options})


def run_alone(sim, tokens, **params):
    """Run one request; returns the (start, tokens) of its steps until it decodes."""
    request = sim.add(tokens, max_tokens=1, **params)
    chunks = []
    while not request.is_finished:
        chunks.append(shape(sim.step())[request.request_id])
    return chunks


def test_a_prompt_stops_at_its_last_multiple_of_the_interval():
    assert run_alone(simulation(), prompt(21)) == [(0, 16), (16, 5)]


def test_a_multiple_at_the_very_end_is_of_no_use_to_the_same_prompt():
    assert run_alone(simulation(), prompt(16)) == [(0, 8), (8, 8)]


def test_chunks_end_at_multiples_where_that_keeps_progress():
    assert run_alone(simulation(max_num_batched_tokens=13), prompt(30)) == [(0, 8), (8, 8), (16, 8), (24, 6)]
    assert run_alone(simulation(max_num_batched_tokens=5), prompt(14)) == [(0, 5), (5, 3), (8, 5), (13, 1)]


def test_chunks_are_as_ever_without_states_or_without_snapshots():
    assert run_alone(small_simulation(), prompt(21)) == [(0, 21)]
    assert run_alone(simulation(snapshots=0), prompt(21)) == [(0, 21)]
    assert run_alone(simulation(enable_chunked_prefill=False), prompt(21)) == [(0, 21)]


def test_a_repeated_prompt_starts_at_the_last_snapshot():
    sim = simulation()
    run_alone(sim, prompt(21))
    assert run_alone(sim, prompt(21))[0] == (16, 4), "and stops where the cached blocks end"
    assert run_alone(sim, prompt(21)) == [(20, 1)]
    assert sim.pool.num_hits == sim.num_restored == 2


def test_the_third_prompt_with_a_common_beginning_starts_where_it_ends():
    sim = simulation(num_blocks=64)
    common, others = prompt(12), (prompt(20, 1), prompt(20, 2), prompt(20, 3))
    assert run_alone(sim, common + others[0]) == [(0, 24), (24, 8)]
    assert run_alone(sim, common + others[1]) == [(0, 12), (12, 12), (24, 8)], "no snapshot there yet, only blocks"
    assert run_alone(sim, common + others[2]) == [(12, 12), (24, 8)]


def test_cached_blocks_without_a_snapshot_are_computed_again():
    sim = simulation(snapshots=0)
    run_alone(sim, prompt(21))
    assert run_alone(sim, prompt(21)) == [(0, 21)]


def test_decodes_save_their_states_at_every_multiple():
    sim = simulation()
    request = sim.add(prompt(5), max_tokens=20, ignore_eos=True)
    sim.run()
    assert sim.pool.num_held == 3, "after 8, 16 and 24 tokens"
    follow_up = sim.add(request.prompt_token_ids + request.output_token_ids, max_tokens=1)
    assert shape(sim.step())[follow_up.request_id] == (24, 1)


def test_the_least_recently_used_snapshot_is_given_up():
    sim = simulation(snapshots=2)
    run_alone(sim, prompt(9, 1))
    run_alone(sim, prompt(9, 2))
    assert run_alone(sim, prompt(9, 1)) == [(8, 1)]
    run_alone(sim, prompt(9, 3))
    assert run_alone(sim, prompt(9, 1)) == [(8, 1)]
    assert run_alone(sim, prompt(9, 2)) == [(0, 8), (8, 1)]


def test_a_request_that_ends_before_its_step_is_done_gives_its_slot_back():
    sim = simulation()
    request = sim.add(prompt(21), max_tokens=2)
    batch = sim.schedule()
    assert sim.pool.num_reserved == 1
    sim.scheduler.abort(request.request_id)
    assert sim.pool.num_reserved == sim.pool.num_held == 0
    sim.finish_step(batch)
    sim.allocator.assert_idle()


def test_a_reset_forgets_snapshots_too():
    sim = simulation()
    run_alone(sim, prompt(21))
    assert sim.pool.num_held
    assert sim.allocator.reset_prefix_cache()
    assert not sim.pool.num_held
    assert run_alone(sim, prompt(21)) == [(0, 16), (16, 5)]
