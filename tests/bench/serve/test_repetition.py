"""Prompts whose answers repeat parts of them."""

import itertools
import json

import pytest

from ulysses_infer.bench.serve.repetition import REPETITIVE, code_edits
from ulysses_infer.bench.serve.serve_options import parse_serve


def first(name, count=4, seed=1, output_len=None):
    return list(itertools.islice(REPETITIVE[name](200, output_len, seed), count))


@pytest.mark.parametrize("name", REPETITIVE)
def test_prompts_repeat_with_their_seed_alone(name):
    assert first(name) == first(name)
    assert first(name) != first(name, seed=2)
    assert {item.output_len for item in first(name, output_len=7)} == {7}
    assert all(item.output_len > 0 and item.content.endswith("\n") for item in first(name))


def test_an_edit_renames_one_variable_everywhere():
    for edit in itertools.islice(code_edits(200, 3), 5):
        assert edit.old_name in edit.before
        assert edit.after.count(edit.new_name) >= 3
        assert edit.after.replace(edit.new_name, edit.old_name) == edit.before.replace(edit.new_name, edit.old_name)
    (item,) = first("code_edit", 1)
    assert edit_of(item).before in item.content


def edit_of(item):
    return next(edit for edit in code_edits(200, 1) if edit.before in item.content)


def test_records_are_shown_as_lines_and_as_json():
    (item,) = first("json_records", 1)
    shown = [line for line in item.content.splitlines() if line.startswith("{")]
    for line in shown:
        assert ", ".join(map(str, json.loads(line).values())) in item.content
    assert item.content.count("\n") > 2 * len(shown)


@pytest.mark.parametrize("name", REPETITIVE)
def test_the_command_knows_them(name):
    assert parse_serve(["--dataset", name]).dataset == name
