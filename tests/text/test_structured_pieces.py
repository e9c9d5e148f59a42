"""Alternatives of text, tokens and JSON."""

import pytest
from grammars import NUM_BYTES, matcher, matches

from ulysses_infer.errors import RequestError

OPEN, CLOSE = NUM_BYTES, NUM_BYTES + 1
OBJECT = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"], "additionalProperties": False}
CALL = [{"tokens": [OPEN]}, {"text": "f"}, {"regex": "[ /]?"}, {"json": OBJECT}, {"tokens": [CLOSE]}]
WANTED = [[{"json": OBJECT}], [{"repeat": [CALL], "min": 1, "max": 2}]]


def test_either_alternative_is_admitted():
    assert matches('{"a": 1}', alternatives=WANTED)
    for space in ("", " ", "/"):
        assert matches([OPEN, f'f{space}{{"a": 1}}', CLOSE], alternatives=WANTED)
    assert matches([OPEN, 'f{"a":1}', CLOSE] * 2, alternatives=WANTED)


@pytest.mark.parametrize(
    "text", ['{"a": "x"}', "text", ['{"a": 1}', OPEN], [OPEN, 'f{"a":1}'], [OPEN, 'f{"a":1}', CLOSE] * 3], ids=str
)
def test_nothing_else_is_admitted(text):
    assert not matches(text, alternatives=WANTED)


def test_schemas_inside_are_checked():
    with pytest.raises(RequestError, match="minimum"):
        matcher(alternatives=[[{"json": {"type": "integer", "minimum": 10**20}}]])


NESTED = [{"text": "a"}]
for _ in range(20):
    NESTED = [{"repeat": [NESTED], "min": 0, "max": None}]
WRONG = [
    {},
    [],
    [{"text": "a"}],
    [[{"text": ""}]],
    [[{"tokens": ["x"]}]],
    [[{"other": 1}]],
    [[{"regex": "a\n%json {}"}]],
]


@pytest.mark.parametrize("wanted", [*WRONG, [NESTED], [[{"repeat": [[]], "min": 3, "max": 1}]]], ids=range(9))
def test_wrong_pieces_are_refused(wanted):
    with pytest.raises(RequestError, match=r"alternatives|nothing to match"):
        matcher(alternatives=wanted)
