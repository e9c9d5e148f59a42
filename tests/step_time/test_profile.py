"""Measured step times in a file."""

from __future__ import annotations

import pytest

from tests.step_time.costs import machine, measured
from ulysses_infer.errors import ConfigError
from ulysses_infer.step_time.profile import Profile, cached_path, read_profile

KEY = {
    "model": {"type": "llama", "hidden_size": 64},
    "modes": [[2, 1], [1, 2]],
    "device": "a processor",
    "threads": 1,
    "versions": {"torch": "2.13"},
}


@pytest.fixture
def profile():
    return Profile(dict(KEY), measured(machine), 0.001, {"seconds": 3.0})


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_a_profile_is_unchanged_after_a_round_trip(profile, tmp_path):
    path = tmp_path / "deep" / "profile.json"
    profile.save(path)
    assert Profile.load(path) == profile
    assert [file.name for file in path.parent.iterdir()] == ["profile.json"]


def test_a_stored_profile_is_found_by_its_key(profile):
    assert read_profile("auto", KEY)[0] is None
    profile.save(cached_path(KEY))
    assert read_profile("auto", KEY) == (profile, "read from the cache")
    assert read_profile("auto", {**KEY, "device": "another"})[0] is None


def test_a_stale_profile_is_not_used_and_the_reason_is_reported(profile):
    profile.save(cached_path(KEY))
    found, why = read_profile("auto", {**KEY, "versions": {"torch": "2.14"}})
    assert found is None
    assert why == "the stored step times do not hold any more: versions is torch 2.13 there and torch 2.14 here"


def test_half_a_file_in_the_cache_is_measured_again(profile):
    profile.save(cached_path(KEY))
    cached_path(KEY).write_text(cached_path(KEY).read_text()[:100])
    assert read_profile("auto", KEY)[0] is None


def test_a_named_profile_of_another_machine_is_refused_with_the_difference(profile, tmp_path):
    path = tmp_path / "profile.json"
    profile.save(path)
    assert read_profile(str(path), KEY)[0] == profile
    with pytest.raises(ConfigError, match=r"^policy\.profile '.*' does not hold here: threads is 1 there and 8 here;"):
        read_profile(str(path), {**KEY, "threads": 8})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "does not exist; write it with ulysses-infer calibrate"),
        ("{}", "is not a profile of step times"),
        ("[1, 2]", "is not a profile of step times"),
        ("nonsense", "is not a profile of step times"),
        ('{"format": 99}', "it has format 99, not 1"),
    ],
)
def test_a_named_file_that_is_not_a_profile_is_one_line(tmp_path, text, message):
    path = tmp_path / "profile.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError, match=message) as caught:
        read_profile(str(path), KEY)
    assert "\n" not in str(caught.value)
