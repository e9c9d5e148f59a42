"""The NVIDIA driver of this machine, and the builds of torch that it can run. Standard library only."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

BUILDS = {"cu126": (12, 6), "cu130": (13, 0), "cu132": (13, 2)}
"""CUDA of each build of torch 2.13, by its tag."""
DEFAULT_BUILD = "cu130"
"""The one that pip installs without --index-url."""
LEAST_DRIVERS = {12: 525, 13: 580}
"""The oldest driver for each major version of CUDA; within one, minor versions are compatible (NVIDIA's CUDA
Compatibility guide, table 1)."""


class Driver(NamedTuple):
    """An NVIDIA driver: its version, and the CUDA version that it was made for; empty if unknown."""

    version: str
    cuda: str

    @property
    def major(self) -> int:
        """The number that decides what it can run."""
        return int(self.version.partition(".")[0])

    def runs(self, build: str) -> bool:
        """Whether it can run torch's build with this tag."""
        return self.major >= LEAST_DRIVERS[BUILDS[build][0]]


def find_driver() -> Driver | None:
    """The driver that `nvidia-smi` reports; None if there is none, or no GPU."""
    if shutil.which("nvidia-smi") is None:
        return None
    result = subprocess.run(["nvidia-smi"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=False)
    return parse_driver(result.stdout) if result.returncode == 0 else None


def parse_driver(text: str) -> Driver | None:
    """The driver in what `nvidia-smi` prints; None if it names none."""
    version = re.search(r"Driver Version:\s*(\d+(?:\.\d+)*)", text)
    cuda = re.search(r"CUDA (?:UMD )?Version:\s*(\d+\.\d+)", text)
    return Driver(version[1], cuda[1] if cuda else "") if version else None


def tag_of(index_url: str) -> str:
    """The CUDA tag in which the address of an index of torch ends; empty if it ends in none."""
    found = re.search(r"/(cu\d+)/?$", index_url)
    return found[1] if found else ""


def misfit(driver: Driver, torch: str, index_url: str | None = None) -> str | None:
    """Why `driver` cannot run the build of `torch` that pip would install, and which one fits; None if it can."""
    build = DEFAULT_BUILD if index_url is None else tag_of(index_url)
    if build not in BUILDS or driver.runs(build):
        return None
    major, minor = BUILDS[build]
    supports = f" supports CUDA {driver.cuda}" if driver.cuda else " is installed"
    found = f"the NVIDIA driver {driver.version}{supports}, but {torch} is built for CUDA"
    needs = f"{major}.{minor} ({build}), which needs driver {LEAST_DRIVERS[major]} or newer"
    fitting = [tag for tag in BUILDS if driver.runs(tag)]
    if not fitting:
        oldest = min(LEAST_DRIVERS.values())
        return f"{found} {needs}; update the driver: no build of {torch} runs with drivers older than {oldest}"
    tag = fitting[-1]
    return f"{found} {needs}; update the driver, or add --index-url with the address of torch's index for {tag}"


def has_nvidia_gpu() -> bool:
    """Whether the driver reports an NVIDIA GPU."""
    if shutil.which("nvidia-smi") is None:
        return any(Path("/proc/driver/nvidia/gpus").glob("*"))
    listing = subprocess.run(["nvidia-smi", "-L"], stdout=subprocess.PIPE, text=True, check=False)
    return listing.returncode == 0 and "GPU" in listing.stdout
