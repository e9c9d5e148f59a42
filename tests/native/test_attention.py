"""Attention in C compared with the reference, on this processor and as built for older ones."""

import ctypes

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.attention.reference import BATCHES, OPTIONS, check, make_options, random_step
from tests.native.building import X86, build_for
from tests.selection import diagonal
from ulysses_infer.attention import backend, native, selection
from ulysses_infer.attention.backend import AttentionOptions
from ulysses_infer.attention.native import NativeAttention
from ulysses_infer.attention.selection import make_backend
from ulysses_infer.attention.torch_loop import TorchLoopAttention
from ulysses_infer.errors import ConfigError
from ulysses_infer.native.library import NativeUnavailableError

CPU = torch.device("cpu")
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
HEADS = {"8 share 2": (8, 2), "4 share 1": (4, 1), "3 own 3": (3, 3)}


def make_native(architecture="native", longest_query=1 << 40):
    """The backend as built for `architecture`, which attends for all prompts by default."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "open_library", lambda name: build_for(name, architecture))
        made = NativeAttention()
    made.longest_query = longest_query
    return made


@pytest.mark.parametrize(
    ("architecture", "batch", "options", "heads", "dtype"),
    diagonal(X86, [*BATCHES], [*OPTIONS], [*HEADS], [*DTYPES]),
)
def test_native_attention_matches_the_reference(architecture, batch, options, heads, dtype):
    check(
        make_native(architecture),
        *BATCHES[batch],
        HEADS[heads],
        make_options(options, HEADS[heads][0]),
        dtype=DTYPES[dtype],
    )


@settings(max_examples=60, deadline=None)
@given(
    architecture=st.sampled_from(X86),
    sequences=st.lists(st.tuples(st.integers(1, 40), st.integers(0, 300)), min_size=1, max_size=5),
    name=st.sampled_from(sorted(OPTIONS)),
    block_size=st.sampled_from([1, 3, 8, 16, 32]),
    key_value_heads=st.integers(1, 3),
    groups=st.integers(1, 8),
    width=st.sampled_from([16, 20, 64, 80, 128, 256]),
    value_width=st.sampled_from([8, 16, 33, 64, 128, 144]),
    dtype=st.sampled_from(list(DTYPES.values())),
    seed=st.integers(0, 1000),
)
def test_any_batch_of_any_shape(
    architecture, sequences, name, block_size, key_value_heads, groups, width, value_width, dtype, seed
):
    lengths = [length for length, _ in sequences]
    contexts = [length + before for length, before in sequences]
    heads = (key_value_heads * groups, key_value_heads)
    options = make_options(name, heads[0], scaling=width**-0.5)
    check(make_native(architecture), lengths, contexts, heads, options, width, value_width, block_size, seed, dtype)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("context", [64, 65, 1000, 5000])
def test_long_contexts(context, dtype):
    options = AttentionOptions(scaling=128**-0.5)
    check(make_native(), [1, 3], [context, context - 1], (12, 4), options, 128, 128, 16, dtype=dtype)


@pytest.mark.parametrize("heads", [(80, 1), (70, 2)], ids=str)
def test_more_query_heads_of_a_key_value_head_than_a_task_has_rows(heads):
    check(make_native(), [1, 3], [70, 20], heads, make_options("sinks", heads[0]))


# Tokens in tiles of 16 rows and chunks of 64 keys: none of these numbers is a multiple of them, or just one.
PROMPTS = {"whole": ([33], [33]), "later": ([49], [177]), "mixed": ([1, 64, 3, 97], [70, 64, 129, 300])}
SPANS = {
    "all": {},
    "window": {"sliding_window": 63},
    "aligned window": {"sliding_window": 64},
    "wide window": {"sliding_window": 65},
    "chunks": {"chunk_size": 80},
}


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("heads", [(2, 2), (8, 2), (8, 1)], ids=str)
@pytest.mark.parametrize("span", SPANS)
@pytest.mark.parametrize("batch", PROMPTS)
def test_a_prompt_of_any_length_and_span(batch, span, heads, dtype):
    options = AttentionOptions(scaling=0.2, **SPANS[span])
    check(make_native(), *PROMPTS[batch], heads, options, 64, 40, 16, dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("options", ["soft cap", "sinks", "window and sinks", "window and soft cap", "all"])
@pytest.mark.parametrize("architecture", X86)
def test_a_prompt_with_caps_and_sinks(architecture, options, dtype):
    lengths, contexts = PROMPTS["mixed"]
    check(make_native(architecture), lengths, contexts, (8, 2), make_options(options, 8), 24, 64, 16, dtype=dtype)


def test_a_prompt_with_a_negative_scaling():
    check(make_native(), [40], [50], (4, 2), AttentionOptions(scaling=-0.3), dtype=torch.float32)


def parts_of(metadata, lengths):
    """The only sequence of a step, its tokens in steps of `lengths`."""
    before = metadata.context_lens[0] - sum(lengths)
    for length in lengths:
        before += length
        yield backend.AttentionMetadata(metadata.slots[:length], [length], [before], metadata.block_tables)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("window", [None, 50])
@pytest.mark.parametrize("architecture", X86)
def test_a_long_prompt_in_chunks_is_bitwise_equal(architecture, window, dtype):
    lengths = [37, 100, 41, 72]
    query, keys, values, metadata, _ = random_step([250], [287], (8, 2), 64, 64, 16, 0, dtype)
    made, options = make_native(architecture), AttentionOptions(scaling=0.125, sliding_window=window)
    whole = made.attend(query, keys, values, metadata, options)
    steps = zip(query.split(lengths), parts_of(metadata, lengths), strict=True)
    assert torch.equal(torch.cat([made.attend(part, keys, values, own, options) for part, own in steps]), whole)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_a_prompt_does_not_depend_on_the_batch(dtype):
    query, keys, values, metadata, _ = random_step([1, 90, 20], [80, 100, 20], (8, 2), 64, 64, 16, 0, dtype)
    made, options = make_native(), AttentionOptions(scaling=0.125)
    alone = backend.AttentionMetadata(metadata.slots[1:91], [90], [100], metadata.block_tables[1:2])
    whole = made.attend(query, keys, values, metadata, options)
    assert torch.equal(made.attend(query[1:91], keys, values, alone, options), whole[1:91])


def outputs_of(backend, step, options):
    query, keys, values, metadata, _ = step
    return backend.attend(query, keys, values, metadata, options)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_a_decode_does_not_depend_on_the_batch(dtype):
    lengths, contexts = [1, 1, 20, 1], [200, 1, 90, 77]
    options, made = AttentionOptions(scaling=0.2, sliding_window=150), make_native()
    together = random_step(lengths, contexts, (6, 2), 32, 32, 8, 0, dtype)
    whole = outputs_of(made, together, options)
    query, keys, values, metadata, _ = together
    for index, row in ((0, 0), (1, 1), (3, 22)):
        slots = metadata.slots[row : row + 1]
        alone = backend.AttentionMetadata(slots, [1], [contexts[index]], metadata.block_tables[index : index + 1])
        assert torch.equal(made.attend(query[row : row + 1], keys, values, alone, options), whole[row : row + 1])


def by_rows(metadata):
    """The same step with a sequence per token, as decodes with drafted tokens are laid out."""
    lengths = torch.tensor(metadata.query_lens)
    last = zip(metadata.query_lens, metadata.context_lens, strict=True)
    contexts = [context - length + 1 + row for length, context in last for row in range(length)]
    tables = metadata.block_tables.repeat_interleave(lengths, 0)
    return backend.AttentionMetadata(metadata.slots, [1] * len(contexts), contexts, tables)


DRAFTED = {"few": ([1, 2, 1, 3], [70, 30, 9, 64]), "many": ([8, 1, 17, 9], [70, 1, 129, 65])}


@pytest.mark.parametrize(
    ("architecture", "batch", "options", "heads", "dtype"),
    diagonal(X86, [*DRAFTED], [*OPTIONS], [*HEADS], [*DTYPES]),
)
def test_drafted_tokens_attend_as_a_chunk_of_their_request_does(architecture, batch, options, heads, dtype):
    shape, given = HEADS[heads], make_options(options, HEADS[heads][0])
    query, keys, values, metadata, _ = random_step(*DRAFTED[batch], shape, 24, 40, 4, 0, DTYPES[dtype])
    made = make_native(architecture)
    whole = made.attend(query, keys, values, metadata, given)
    assert torch.equal(made.attend(query, keys, values, by_rows(metadata), given), whole)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_a_token_of_another_request_is_no_drafted_one(dtype):
    """The second context is longer by one token, but only the first block is the same."""
    query, keys, values, metadata, _ = random_step([1, 1], [30, 31], (4, 2), 16, 16, 4, 0, dtype)
    metadata.block_tables[1, 0] = metadata.block_tables[0, 0]
    options, made = AttentionOptions(scaling=0.25), make_native()
    together = made.attend(query, keys, values, metadata, options)
    for row, context in enumerate(metadata.context_lens):
        tables = metadata.block_tables[row : row + 1]
        alone = backend.AttentionMetadata(metadata.slots[row : row + 1], [1], [context], tables)
        assert torch.equal(made.attend(query[row : row + 1], keys, values, alone, options), together[row : row + 1])


@pytest.mark.parametrize("lengths", [[1], [1] * 40, [30, 1, 100, 400]], ids=["one", "many", "prompts"])
def test_results_do_not_depend_on_the_number_of_threads(lengths):
    step = random_step(lengths, [length + 70 for length in lengths], (8, 4), 64, 64, 16, 0, torch.bfloat16)
    options, made = AttentionOptions(scaling=0.125), make_native()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    one = outputs_of(made, step, options)
    try:
        torch.set_num_threads(2)
        assert torch.equal(outputs_of(made, step, options), one)
    finally:
        torch.set_num_threads(threads)


def test_scores_of_any_size_stay_finite():
    query, keys, values, metadata, _ = random_step([1, 9, 70], [300, 90, 70], (4, 2), 64, 64, 16, 0, torch.float32)
    for scale in (1e-30, 1e4, 1e15):
        output = make_native().attend(query * scale, keys, values, metadata, AttentionOptions(scaling=1.0))
        assert output.isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("architecture", X86)
@pytest.mark.parametrize("options", ["plain", "soft cap"])
def test_nan_propagates(options, architecture, dtype):
    query, keys, values, metadata, _ = random_step([1, 1], [30, 90], (4, 2), 16, 16, 4, 0, dtype)
    slot = metadata.block_tables[1, 5]
    keys[slot, 2, 1] = float("nan")
    output = make_native(architecture).attend(query, keys, values, metadata, make_options(options, 4))
    assert output[1, 2:].isnan().all()
    assert output[0].isfinite().all()
    assert output[1, :2].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("architecture", X86)
@pytest.mark.parametrize("options", ["plain", "soft cap"])
def test_nan_propagates_to_the_tokens_that_see_it(options, architecture, dtype):
    query, keys, values, metadata, _ = random_step([60], [80], (4, 2), 16, 16, 4, 0, dtype)
    keys[metadata.block_tables[0, 12], 3, 1] = float("nan")  # position 51, that of the query's row 31
    output = make_native(architecture).attend(query, keys, values, metadata, make_options(options, 4))
    assert output[31:, 2:].isnan().all()
    assert output[:31].isfinite().all()
    assert output[:, :2].isfinite().all()


def test_queries_may_have_any_strides():
    query, keys, values, metadata, _ = random_step([1, 5], [30, 9], (4, 2), 16, 16, 4, 0, torch.float32)
    options, made = AttentionOptions(scaling=0.25), make_native()
    wanted = made.attend(query, keys, values, metadata, options)
    heads_first = query.transpose(0, 1).contiguous().transpose(0, 1)
    width_first = query.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    for strided in (heads_first, width_first):
        assert torch.equal(made.attend(strided, keys, values, metadata, options), wanted)


def test_each_step_has_its_own_sequences():
    made, options = make_native(), AttentionOptions(scaling=0.25)
    for lengths, contexts in (([1, 1], [30, 9]), ([1], [40]), ([4, 1], [40, 7])):
        check(made, lengths, contexts, (4, 2), options)


@pytest.mark.parametrize("batch", BATCHES)
def test_longer_queries_fall_back_to_torch(batch):
    check(make_native(longest_query=5), *BATCHES[batch], (4, 2), make_options("window", 4))


def test_a_cache_of_another_type_falls_back_to_torch():
    step = random_step([1, 5], [12, 9], (4, 2), 16, 16, 4, 0, torch.float16)
    options, made = AttentionOptions(scaling=0.25), make_native()
    made._functions = {}
    assert torch.equal(outputs_of(made, step, options), outputs_of(TorchLoopAttention(), step, options))


def test_out_of_memory_is_an_error():
    made = make_native()
    failing = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)(lambda *_: 1)
    made._functions[torch.float32]._function = failing
    with pytest.raises(MemoryError):
        check(made, [1], [5], (4, 2), AttentionOptions(scaling=1.0))


def test_without_a_compiler_auto_is_torch_and_native_is_refused(monkeypatch):
    def unavailable(name):
        raise NativeUnavailableError("no C compiler was found")

    monkeypatch.setattr(native, "open_library", unavailable)
    monkeypatch.setattr(selection, "is_available", lambda name: False)
    assert make_backend("auto", CPU).name == "torch"
    with pytest.raises(ConfigError, match="attention_backend is native, but no C compiler was found; use auto"):
        make_backend("native", CPU)


def test_auto_is_native_on_a_cpu_that_can_build_it():
    build_for("attention", "native")
    assert make_backend("auto", CPU).name == "native"
    assert make_backend("torch", CPU).name == "torch"
