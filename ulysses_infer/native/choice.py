"""Which kernel is fastest for a number of rows: measured on this processor once, and kept on disk."""

from __future__ import annotations

import bisect
import fcntl
import hashlib
import json
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from ulysses_infer.atomic_files import write_atomically
from ulysses_infer.cache_folders import cache_folder
from ulysses_infer.native.function import recording_paused
from ulysses_infer.native.levels import describe_processor
from ulysses_infer.native.library import library_path

logger = logging.getLogger(__name__)
ROWS = (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 13, 14, 16, 17, 20, 24, 25, 28, 32, 33, 40, 48, 49, 64, 65, 96, 128, 256)
"""Numbers of rows that are measured: those at which a kernel needs one more vector, and some between."""
RUNS, LEAST_SECONDS = 5, 3e-3  # of each kernel, at least: short calls are repeated more often
MANY = 64  # rows, from which on
HOPELESS = 2.0  # times the fastest kernel's time rules a kernel out for more rows
TORCH = "torch"
TORCH_LIMITS = ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA", "ONEDNN_DEFAULT_FPMATH_MODE", "MKL_ENABLE_INSTRUCTIONS")
TORCH_FROM = 16  # rows: below, steps are to be replayed in C, without calls of torch
TORCH_MARGIN = 1.5  # of torch's time: it is called from Python, also when a CPU graph replays the rest in C
CHANGE_MARGIN = 0.97  # of the time of the kernel for fewer rows: closer ones are measurement noise
Prepare = Callable[[str, int], Callable[[], object]]


class Choice:
    """The kernel for each number of rows."""

    def __init__(self, kernels: Mapping[int, str]) -> None:
        """kernels: {rows: kernel from that number of rows on}, for example {1: "few", 17: "panels"}."""
        self._starts = sorted(kernels)
        self._names = [kernels[start] for start in self._starts]

    def __call__(self, rows: int) -> str:
        """The kernel's name for `rows` rows, at least 1."""
        return self._names[bisect.bisect_right(self._starts, max(rows, self._starts[0])) - 1]

    @property
    def kernels(self) -> dict[int, str]:
        """What it was made of."""
        return dict(zip(self._starts, self._names, strict=True))


def measured_choice(library: str, subject: str, names: Sequence[str], prepare: Prepare) -> Choice:
    """The fastest of the kernels `names` for each number of rows.

    `prepare(name, rows)` returns a call to time. Measured by CPU time on one thread, in about a second, by one process
    of a host while others wait; then read from the cache folder, as long as `library`.c, torch and the processor stay.
    """
    code = [library_path(library).read_bytes(), Path(__file__).read_bytes()]
    identity = [*code, describe_processor().encode(), *(part.encode() for part in torch_identity())]
    key = hashlib.sha256(b"\0".join([*identity, *(name.encode() for name in (subject, *names))])).hexdigest()[:16]
    path = cache_folder("native") / f"{subject}-{key}.json"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path.with_suffix(".lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            return _read(path) or _measure_to(path, subject, names, prepare)
    except OSError as error:
        logger.info("%s cannot be written (%s): kernels are measured at every start", path.parent, error.strerror)
        return measure(names, prepare)


def torch_identity() -> list[str]:
    """What decides how fast torch's products are: its version, and the instructions that it and its libraries may use,
    which the environment can limit."""
    limits = [f"{name}={os.environ.get(name, '')}" for name in TORCH_LIMITS]
    return [torch.__version__, torch.backends.cpu.get_cpu_capability(), *limits]


def measure(names: Sequence[str], prepare: Prepare, rows: Sequence[int] = ROWS) -> Choice:
    """See `measured_choice`."""
    kernels: dict[int, str] = {}
    left, last = list(names), ""
    with _on_one_thread(), recording_paused():
        for count in rows:
            able = [name for name in left if name != TORCH or count >= TORCH_FROM]
            times = _times(able, prepare, count)
            fastest = min(times, key=times.__getitem__)
            if last in times and times[fastest] > CHANGE_MARGIN * times[last]:
                fastest = last
            if fastest != last:
                kernels[count] = last = fastest
            if count >= MANY:
                left = [name for name in able if times[name] <= HOPELESS * times[fastest]]
    return Choice(kernels)


@contextmanager
def _on_one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _times(names: Sequence[str], prepare: Prepare, rows: int) -> dict[str, float]:
    """The shortest CPU seconds of each kernel, measured alternately; torch's with its margin."""
    calls = {name: prepare(name, rows) for name in names}
    best = dict.fromkeys(names, float("inf"))
    for call in calls.values():
        call()
    runs, spent = 0, 0.0
    while runs < RUNS or spent < LEAST_SECONDS * len(calls):
        runs += 1
        for name, call in calls.items():
            started = time.thread_time()
            call()
            seconds = time.thread_time() - started
            best[name], spent = min(best[name], seconds), spent + seconds
    return {name: seconds * (TORCH_MARGIN if name == TORCH else 1) for name, seconds in best.items()}


def _read(path: Path) -> Choice | None:
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):
        return None
    return Choice({int(rows): name for rows, name in stored.items()})


def _measure_to(path: Path, subject: str, names: Sequence[str], prepare: Prepare) -> Choice:
    started = time.perf_counter()
    choice = measure(names, prepare)
    write_atomically(path, json.dumps(choice.kernels))
    logger.info("%s: fastest kernels %s, in %.1f s", subject, choice.kernels, time.perf_counter() - started)
    return choice
