"""Drivers and the builds of torch that they run, and what `tools/run.py` installs, with a fake nvidia-smi on PATH."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tools import run
from tools.gpu_driver import BUILDS, DEFAULT_BUILD, Driver, find_driver, has_nvidia_gpu, misfit, parse_driver

HEADER = """Sun Nov 29 08:00:00 2026
+-----------------------------------------------------------------------------------------+
| NVIDIA-SMI {version:<22}  Driver Version: {version:<14}  {cuda:<20} |
|-----------------------------------------+------------------------+----------------------+
| GPU  Name                 Persistence-M | Bus-Id          Disp.A | Volatile Uncorr. ECC |
+-----------------------------------------+------------------------+----------------------+
"""
TORCH = "torch==2.13.0"


@pytest.fixture
def nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """`nvidia_smi(version, cuda)`: puts a program of that name on PATH, which reports this driver and one GPU."""

    def put(version: str | None, cuda: str = "") -> None:
        (tmp_path / "header").write_text(HEADER.format(version=version or "", cuda=cuda))
        listing = "echo 'GPU 0: NVIDIA H200 (UUID: GPU-0)'"
        program = f'#!/bin/sh\nif [ "$1" = -L ]; then {listing}; else cat {tmp_path / "header"}; fi\n'
        if version is None:  # as without a driver
            program = (
                "#!/bin/sh\necho 'NVIDIA-SMI has failed because it could not communicate with the driver'\nexit 9\n"
            )
        path = tmp_path / "nvidia-smi"
        path.write_text(program)
        path.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")

    return put


@pytest.mark.parametrize(
    ("version", "cuda", "expected"),
    [
        ("550.54.15", "CUDA Version: 12.4", Driver("550.54.15", "12.4")),
        ("580.65.06", "CUDA Version: 13.0", Driver("580.65.06", "13.0")),
        ("590.44.01", "CUDA UMD Version: 13.1", Driver("590.44.01", "13.1")),
        ("470.82", "", Driver("470.82", "")),
    ],
)
def test_the_driver_is_read_from_nvidia_smi(
    nvidia_smi: Callable[..., None], version: str, cuda: str, expected: Driver
) -> None:
    nvidia_smi(version, cuda)

    assert find_driver() == expected
    assert has_nvidia_gpu()


def test_a_machine_without_driver_has_none(nvidia_smi: Callable[..., None]) -> None:
    nvidia_smi(None)

    assert find_driver() is None
    assert not has_nvidia_gpu()
    assert parse_driver("") is None


def test_a_driver_that_fits_is_no_problem() -> None:
    assert misfit(Driver("580.65.06", "13.0"), TORCH) is None
    assert misfit(Driver("595.10", "13.2"), TORCH) is None
    assert misfit(Driver("550.54.15", "12.4"), TORCH, "https://index/whl/cu126/") is None
    assert misfit(Driver("550.54.15", "12.4"), TORCH, "https://index/simple") is None  # of unknown builds


@pytest.mark.parametrize(
    ("driver", "words"),
    [
        (
            Driver("550.54.15", "12.4"),
            ("driver 550.54.15 supports CUDA 12.4", "CUDA 13.0 (cu130)", "driver 580", "--index-url", "for cu126"),
        ),
        (Driver("470.82", ""), ("driver 470.82 is installed", "driver 580", "older than 525")),
    ],
)
def test_an_old_driver_gives_one_line_with_the_build_that_fits(driver: Driver, words: tuple[str, ...]) -> None:
    text = misfit(driver, TORCH)

    assert text is not None
    assert "\n" not in text
    assert all(word in text for word in words), text
    assert "://" not in text


def test_a_build_that_is_asked_for_is_checked_too() -> None:
    text = misfit(Driver("470.82", "11.4"), TORCH, "https://index/whl/cu126")

    assert text is not None
    assert "CUDA 12.6 (cu126), which needs driver 525" in text
    assert DEFAULT_BUILD in BUILDS


def test_run_stops_before_installing_what_the_driver_cannot_run(
    nvidia_smi: Callable[..., None], tmp_path: Path
) -> None:
    nvidia_smi("550.54.15", "CUDA Version: 12.4")
    environment = run.Environment(tmp_path / "venv")

    with pytest.raises(SystemExit, match="error: the NVIDIA driver 550"):
        environment.prepare("demo")
    assert not environment.folder.exists()


@pytest.mark.parametrize(
    ("version", "cuda", "index_url", "expected"),
    [
        ("580.65.06", "13.0", None, [(f"{TORCH},!=2.13.0+cpu",), ("-e", f"{run.ROOT}[gpu]")]),
        (
            "550.54.15",
            "12.4",
            "https://index/whl/cu126",
            [("--index-url", "https://index/whl/cu126", f"{TORCH}+cu126"), ("-e", f"{run.ROOT}[gpu]")],
        ),
        (None, "", None, [(TORCH,), ("-e", str(run.ROOT))]),
    ],
)
def test_run_installs_what_the_machine_needs(
    nvidia_smi: Callable[..., None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    version: str | None,
    cuda: str,
    index_url: str | None,
    expected: list[tuple[str, ...]],
) -> None:
    nvidia_smi(version, f"CUDA Version: {cuda}")
    environment, installed = run.Environment(tmp_path / "venv"), []
    environment.bin.mkdir(parents=True)
    (environment.bin / "python").touch()
    monkeypatch.setattr(environment, "pip_install", lambda *words: installed.append(words))

    environment.prepare("demo", index_url)

    assert installed == expected
    assert environment.is_ready("demo")
    assert not environment.is_ready("test")


def test_the_index_is_taken_from_the_arguments() -> None:
    assert run.take_index_url(["a=1"]) == (None, ["a=1"])
    assert run.take_index_url(["--index-url", "u", "a=1"]) == ("u", ["a=1"])
    assert run.take_index_url(["a=1", "--index-url=u"]) == ("u", ["a=1"])
    with pytest.raises(SystemExit, match="needs the address"):
        run.take_index_url(["--index-url"])
