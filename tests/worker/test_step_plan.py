"""Step plans: their encoding, and the rows that need logits."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from ulysses_infer.engine.batch import Batch, ScheduledRequest, make_plan
from ulysses_infer.engine.request import Request
from ulysses_infer.parallel.layout import Mode
from ulysses_infer.sampling_params import SamplingParams
from ulysses_infer.worker.step_plan import (
    ALL_LOGITS,
    DRAFT_LOGITS,
    LAST_LOGITS,
    NO_LOGITS,
    PlanItem,
    StepPlan,
    adapter_rows,
    logits_positions,
)

big = st.integers(0, 2**31 - 1)
items = st.builds(
    PlanItem,
    big,
    st.integers(0, 2**20),
    st.integers(1, 9),
    st.lists(big, max_size=5),
    st.sampled_from([NO_LOGITS, LAST_LOGITS, ALL_LOGITS, DRAFT_LOGITS]),
    st.integers(0, 3),
)


@st.composite
def plans(draw):
    listed = draw(st.lists(items, min_size=1, max_size=6))
    tokens = draw(st.lists(big, min_size=sum(i.num_tokens for i in listed), max_size=sum(i.num_tokens for i in listed)))
    mode = Mode(draw(st.integers(1, 64)), draw(st.integers(1, 64)))
    return StepPlan(
        draw(st.integers(0, 2**40)),
        mode,
        listed,
        np.array(tokens, dtype=np.int32),
        draw(st.lists(big, max_size=5)),
        draw(st.booleans()),
    )


@given(plans())
def test_a_decoded_plan_is_the_plan(plan):
    decoded = StepPlan.decode(plan.encode())
    assert decoded._replace(token_ids=None) == plan._replace(token_ids=None)
    assert np.array_equal(decoded.token_ids, plan.token_ids)
    assert (type(decoded.mode), type(decoded.items[0])) == (Mode, PlanItem)
    assert decoded.digest == plan.digest
    assert decoded.num_tokens == sum(item.num_tokens for item in plan.items)


@given(plans())
def test_plans_that_differ_have_different_digests(plan):
    other = plan._replace(mode=Mode(plan.mode.sp + 1, plan.mode.tp))
    assert other.digest != plan.digest
    assert plan._replace(sequence=plan.sequence + 1).digest != plan.digest


@given(st.lists(items, min_size=1, max_size=6), st.data())
def test_every_token_of_a_slice_goes_through_the_adapter_of_its_sequence(listed, data):
    adapters = [item.adapter for item in listed for _ in range(item.num_tokens)]
    start = data.draw(st.integers(0, len(adapters)))
    stop = data.draw(st.integers(start, len(adapters)))
    found = dict(adapter_rows(listed, start, stop))
    assert 0 not in found
    for number in (1, 2, 3):
        expected = [row for row, adapter in enumerate(adapters[start:stop]) if adapter == number]
        assert found.get(number, np.zeros(0)).tolist() == expected


@given(st.lists(items, max_size=6))
def test_positions_of_logits_are_the_last_or_all_tokens_of_their_sequence(listed):
    wanted, offset = [], 0
    for item in listed:
        mine = list(range(offset, offset + item.num_tokens))
        wanted += {NO_LOGITS: [], LAST_LOGITS: mine[-1:], ALL_LOGITS: mine, DRAFT_LOGITS: mine}[item.logits]
        offset += item.num_tokens
    found = logits_positions(listed)
    assert found.tolist() == wanted
    assert found.dtype == np.int64


def request(index, prompt, output=(), **params):
    made = Request(str(index), index, list(prompt), SamplingParams(**params), arrival_time=0.0)
    made.output_token_ids += output
    return made


def test_a_plan_is_its_batch():
    decode = request(7, [1, 2, 3], output=[4, 5])
    chunk = request(8, range(10, 20))
    last = request(9, range(20, 26))
    batch = Batch(
        [ScheduledRequest(decode, 4, 1, [], True)],
        [ScheduledRequest(chunk, 0, 4, [3, 1], False), ScheduledRequest(last, 4, 2, [6], True)],
    )
    plan = make_plan(3, Mode(2, 1), batch, [5], False)
    assert plan.token_ids.tolist() == [5, 10, 11, 12, 13, 24, 25]
    assert [item.logits for item in plan.items] == [LAST_LOGITS, NO_LOGITS, LAST_LOGITS]
    assert [(item.handle, item.start, item.num_tokens) for item in plan.items] == [(7, 4, 1), (8, 0, 4), (9, 4, 2)]
    assert (plan.sequence, plan.mode, plan.dropped, plan.full_logits) == (3, Mode(2, 1), [5], False)


def test_drafted_tokens_follow_the_known_one_and_want_every_row():
    decode, chunk = request(7, [1, 2, 3], output=[4, 5]), request(8, range(10, 20))
    verified = ScheduledRequest(decode, 4, 3, [2], True, drafts=(8, 9))
    alone = make_plan(3, Mode(1, 1), Batch([verified], []), [], False)
    assert alone.token_ids.tolist() == [5, 8, 9]
    assert alone.items == [PlanItem(7, 4, 3, [2], DRAFT_LOGITS)]
    assert alone.runs_by_row
    batch = Batch([verified], [ScheduledRequest(chunk, 0, 4, [], False)])
    assert not make_plan(4, Mode(1, 1), batch, [], False).runs_by_row
    assert (batch.num_decodes, batch.num_drafted, batch.num_decode_rows, batch.num_prefill_tokens) == (1, 2, 3, 4)
    assert batch.shape.num_decodes == 3
    assert batch.shape.decode_context == 5 + 6 + 7


def test_prompt_log_probabilities_want_every_row_of_the_prompt_and_the_last_of_decodes():
    scored = request(1, range(8), prompt_logprobs=0)
    chunk = make_plan(0, Mode(1, 1), Batch([], [ScheduledRequest(scored, 0, 5, [0], False)]), [], True)
    rest = make_plan(1, Mode(1, 1), Batch([], [ScheduledRequest(scored, 5, 3, [], True)]), [], True)
    scored.output_token_ids += [9]
    decode = make_plan(2, Mode(1, 1), Batch([ScheduledRequest(scored, 8, 1, [], True)], []), [], True)
    assert [plan.items[0].logits for plan in (chunk, rest, decode)] == [ALL_LOGITS, ALL_LOGITS, LAST_LOGITS]
