"""Weights in huge pages."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from ulysses_infer.model.loading import huge_pages
from ulysses_infer.model.loading.huge_pages import COLLAPSE, LARGEST, PREFER, huge_page_bytes, use_huge_pages

BYTES = 16 << 20


def settings(folder: Path, enabled: str, size: int) -> Path:
    (folder / "enabled").write_text(enabled)
    (folder / "hpage_pmd_size").write_text(f"{size}\n")
    return folder


def kib_in_huge_pages(tensor: torch.Tensor) -> int:
    """KiB of the mapping that the tensor lies in."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if found := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(found[1], 16) <= tensor.data_ptr() < int(found[2], 16)
        elif inside and line.startswith("AnonHugePages:"):
            return int(line.split()[1])
    return 0


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int, int]]:
    """What the kernel is asked for; it refuses all of it."""
    asked: list[tuple[int, int, int]] = []

    def advise(start: int, size: int, advice: int) -> int:
        asked.append((start, size, advice))
        return -1

    monkeypatch.setattr(huge_pages, "_madvise", lambda: advise)
    monkeypatch.setattr(huge_pages, "huge_page_bytes", lambda: LARGEST)
    return asked


def test_values_and_addresses_stay_the_same() -> None:
    values = torch.arange(BYTES // 8)
    view, address = values.view(2, -1)[1], values.data_ptr()
    use_huge_pages([values])
    assert values.data_ptr() == address
    assert torch.equal(values, torch.arange(BYTES // 8))
    values[-1] = 7
    assert view[-1] == 7


def makes_huge_pages() -> bool:
    """Whether the system does so at once when asked."""
    page, advise = huge_page_bytes(), huge_pages._madvise()
    if not page or advise is None:
        return False
    other = torch.ones(BYTES // 4)
    return advise(other.data_ptr() // page * page + page, page, COLLAPSE) == 0


@pytest.mark.skipif(not makes_huge_pages(), reason="this system makes no huge pages on request")
def test_the_memory_of_a_large_tensor_is_in_huge_pages() -> None:
    values = torch.ones(BYTES // 4)
    use_huge_pages([values])
    assert kib_in_huge_pages(values) << 10 >= BYTES


def test_whole_pages_around_each_tensor_are_asked_for_once(calls: list[tuple[int, int, int]]) -> None:
    values = torch.ones(BYTES // 4)
    use_huge_pages([values[: len(values) // 2], values[1:], values.view(4, -1)])
    assert [advice for _, _, advice in calls] == [PREFER, COLLAPSE]
    for start, size, _ in calls:
        assert start % LARGEST == 0
        assert size % LARGEST == 0
        assert start <= values.data_ptr()
        assert start + size >= values.data_ptr() + BYTES
        assert size < BYTES + 2 * LARGEST


def test_a_kernel_that_refuses_changes_nothing(calls: list[tuple[int, int, int]]) -> None:
    values = torch.ones(BYTES // 4)
    use_huge_pages([values])
    assert calls
    assert values.sum() == BYTES // 4


def test_small_tensors_and_those_of_other_devices_are_left_alone(calls: list[tuple[int, int, int]]) -> None:
    use_huge_pages([torch.ones(64), torch.ones(BYTES, device="meta")])
    assert calls == []


@pytest.mark.parametrize("enabled", ["[always] madvise never", "always [madvise] never"])
def test_huge_pages_are_used_where_programs_may_ask_for_them(tmp_path: Path, enabled: str) -> None:
    assert huge_page_bytes(settings(tmp_path, enabled, LARGEST)) == LARGEST


@pytest.mark.parametrize(
    ("enabled", "size"), [("always madvise [never]", LARGEST), ("[always] madvise never", 512 << 20)]
)
def test_neither_a_refusal_by_the_administrator_nor_pages_too_large_are_overruled(
    tmp_path: Path, enabled: str, size: int
) -> None:
    assert huge_page_bytes(settings(tmp_path, enabled, size)) == 0


def test_a_system_without_huge_pages_has_none(tmp_path: Path) -> None:
    assert huge_page_bytes(tmp_path / "missing") == 0
