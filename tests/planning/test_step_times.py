"""Predicted step times follow the hardware: faster parts never make a step slower."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.planning.plans import faster, free_links, llama_sizes, operations, swiftkv_sizes
from ulysses_infer.engine.calibration_points import Limits
from ulysses_infer.errors import ConfigError
from ulysses_infer.parallel.layout import Mode
from ulysses_infer.planning.node import Node, known_nodes, load_node
from ulysses_infer.planning.operations import Changes, StepOperations
from ulysses_infer.planning.recurrent import RecurrentSizes
from ulysses_infer.planning.step_times import AnalyticStepTimes, MeasuredStepTimes, profile_of
from ulysses_infer.step_time.prior import GPU, Sizes, step_seconds
from ulysses_infer.step_time.step_shape import StepShape

MODES = [Mode(8, 1), Mode(4, 2), Mode(2, 4), Mode(1, 8)]
shapes = st.builds(
    StepShape.of,
    st.lists(st.integers(1, 4000), max_size=20),
    st.lists(st.tuples(st.integers(0, 2000), st.integers(1, 2000)), min_size=1, max_size=3),
)


def times(node: Node) -> AnalyticStepTimes:
    return AnalyticStepTimes(operations(node), MODES)


@settings(max_examples=40, deadline=None)
@given(
    shapes,
    st.sampled_from(MODES),
    st.sampled_from(["products", "prefill_attention", "decode_attention", "elementwise", "all_reduce", "all_to_all"]),
    st.floats(1, 10),
)
def test_more_speed_is_never_slower(shape, mode, part, factor):
    node = load_node("8xh200")
    assert times(faster(node, part, factor)).seconds(mode, shape) <= times(node).seconds(mode, shape) * (1 + 1e-9)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 8000), st.integers(1, 2000), st.sampled_from(MODES))
def test_more_tokens_are_never_faster(tokens, more, mode):
    own = times(load_node("8xh200"))
    fewer, many = (StepShape.of([], [(0, count)]) for count in (tokens, tokens + more))
    assert own.device_seconds(mode, fewer) <= own.device_seconds(mode, many) * (1 + 1e-9)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 8000))
def test_with_free_links_sequence_parallelism_loses_at_most_the_reading_of_its_weights(tokens):
    node = load_node("8xh200")
    sizes = llama_sizes()
    own = AnalyticStepTimes(operations(free_links(node), sizes), MODES)
    shape = StepShape.of([], [(0, tokens)])
    reading = 2 * sizes.layer_weights / node.products["bf16"].bytes_per_second
    norms = sizes.num_layers * node.elementwise.floor_seconds  # which the sum over the ranks includes
    assert own.device_seconds(Mode(8, 1), shape) <= own.device_seconds(Mode(1, 8), shape) + reading + norms


def test_operations_add_up_to_the_step():
    own = times(load_node("8xh200"))
    shape = StepShape.of([4096], [])
    found = own.explain(Mode(1, 8), shape)
    assert sum(operation.total for operation in found) == pytest.approx(own.seconds(Mode(1, 8), shape))
    assert {"vocabulary head", "attention", "host"} <= {operation.name for operation in found}
    assert not any("all-to-all" in operation.name for operation in found)


def test_a_profile_of_the_predictions_predicts_the_same():
    own = times(load_node("8xh200"))
    free = replace(load_node("8xh200").host, step_seconds=0.0, sequence_seconds=0.0)
    measured = MeasuredStepTimes(profile_of(own, Limits(8192, 256, 131072, 1 << 20)), free)
    for mode in MODES:
        shape = StepShape.of([], [(0, 512)])
        assert measured.seconds(mode, shape) == pytest.approx(own.seconds(mode, shape), rel=0.1)


@pytest.mark.parametrize("name", known_nodes())
def test_every_node_names_its_sources(name):
    node = load_node(name)
    assert node.notes
    assert all(getattr(node, field.name) is not None for field in fields(node))
    assert {2} <= set(node.all_reduce)


def test_an_unknown_node_names_the_nearest():
    with pytest.raises(ConfigError, match=r"hardware '8xh20' is unknown; the nearest is 8xh200 \(known: "):
        load_node("8xh20")


def test_a_broken_node_file_is_one_line(tmp_path):
    path = tmp_path / "own.yaml"
    path.write_text("device: X\n")
    with pytest.raises(ConfigError, match="is not valid: KeyError: 'num_devices'"):
        load_node(str(path))


def test_uneven_routing_slows_only_experts_that_ranks_own():
    mixture = llama_sizes()
    mixture = replace(
        mixture, num_experts=32, experts_per_token=4, expert_width=512, num_expert_layers=4, num_dense_layers=0
    )
    node, shape, mode = load_node("8xh200"), StepShape.of([], [(0, 4096)]), Mode(8, 1)
    for placement, is_slower in (("replicate", False), ("width", False), ("expert", True)):
        even, uneven = (
            AnalyticStepTimes(StepOperations(sizes, node, placement, Changes()), MODES).seconds(mode, shape)
            for sizes in (mixture, replace(mixture, expert_imbalance=2.0))
        )
        assert (uneven > even) == is_slower


def test_selected_keys_bound_attention_and_its_index_reads_every_token():
    node, shapes = load_node("8xh200"), [StepShape.of([context] * 64, []) for context in (2048, 4000)]
    sparse = replace(llama_sizes(), selected=1024, index_heads=4, index_width=64)
    short, long = ({each.name: each.seconds for each in operations(node, sparse).of(MODES[0], s)} for s in shapes)
    assert long["attention"] == short["attention"]
    assert long["index of sparse attention"] > short["index of sparse attention"]


def test_a_recurrent_layer_takes_as_long_after_any_context():
    hybrid = replace(
        llama_sizes(), num_attention_layers=1, num_recurrent_layers=3, recurrent=RecurrentSizes(4096, 1024, 65536, 8192)
    )
    shapes = [StepShape.of([context] * 64, []) for context in (16, 4000)]
    short, long = (
        {each.name: each for each in operations(load_node("8xh200"), hybrid).of(MODES[0], s)} for s in shapes
    )
    assert short["recurrence of decodes"] == long["recurrence of decodes"]
    assert long["recurrence of decodes"].times == 3


LONG_PROMPT, DECODES = StepShape.of([], [(0, 4096)]), StepShape.of([1000] * 16, [])


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_prompts_skip_later_layers_of_swiftkv_and_decodes_do_not(mode):
    plain, skipping, sharing = (
        operations(load_node("8xh200"), swiftkv_sizes(*sizes)) for sizes in ((None,), (16,), (16, 8))
    )
    most = 0.6 if mode.sp == 1 else 0.75  # with sequence parallelism, a rank reads later weights for its one token
    assert 0.5 < skipping.seconds(mode, LONG_PROMPT) / plain.seconds(mode, LONG_PROMPT) < most
    assert 1 <= skipping.seconds(mode, DECODES) / plain.seconds(mode, DECODES) < 1.15
    assert sharing.seconds(mode, LONG_PROMPT) < skipping.seconds(mode, LONG_PROMPT)
    layers = {each.name: each.times for each in skipping.of(mode, LONG_PROMPT)}
    assert layers["attention"] == layers["attention of later layers"] == 16


def test_a_model_measured_from_swiftkv_steps_predicts_short_prompts_and_whole_decodes():
    node = load_node("8xh200")
    free = replace(node.host, step_seconds=0.0, sequence_seconds=0.0)
    own = AnalyticStepTimes(operations(node, swiftkv_sizes()), MODES)
    measured = MeasuredStepTimes(profile_of(own, Limits(8192, 256, 131072, 1 << 20)), free)
    for mode in MODES:
        for shape in (LONG_PROMPT, DECODES, StepShape.of([1000] * 16, [(0, 2048)])):
            assert measured.seconds(mode, shape) == pytest.approx(own.seconds(mode, shape), rel=0.15), (mode, shape)


def test_estimates_before_any_measurement_know_what_prompts_skip():
    plain = Sizes(32, 4096, 32, 8, 128, 7_000_000_000, 2)
    skipping = plain._replace(skipped_share=0.5)
    for mode in MODES:
        for shape, least, most in ((LONG_PROMPT, 0.5, 0.55), (DECODES, 1, 1)):
            ratio = step_seconds(skipping, GPU, mode, shape) / step_seconds(plain, GPU, mode, shape)
            assert least <= ratio <= most
