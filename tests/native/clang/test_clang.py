"""clang compiles the kernels where there is no gcc: they compute what gcc's do, on torch's threads."""

import ctypes
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ulysses_infer.native import library
from ulysses_infer.native.compiler import STRICT, compile_library, find_compiler, sources
from ulysses_infer.native.levels import levels_of_machine

pytestmark = pytest.mark.skipif(not shutil.which("clang"), reason="needs clang")
ROOT = Path(__file__).parents[3]
LOOPS = Path(__file__).with_name("loops.c")
LOOP_NAMES = (
    "rising",
    "rising_by_three",
    "falling",
    "of_two_loops",
    "handed_out",
    "nested",
    "reduced",
    "with_many_variables",
)
NUMERICAL = (
    "native/test_attention.py",
    "native/test_elementwise.py",
    "native/test_expert_products.py",
    "native/test_matmul.py",
    "native/test_native_draws.py",
    "native/test_native_routing.py",
    "native/test_quantized_products.py",
    "native/test_recurrent_kernels.py",
    "parallel/test_shared_memory.py",
    "worker/graphs/test_cpu_graphs.py",
)


@pytest.fixture
def clang(monkeypatch):
    monkeypatch.setenv("CC", "clang")
    return find_compiler()


@pytest.fixture
def threads():
    """Sets torch's number of threads for one test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", LOOP_NAMES)
def test_parallel_loops_run_each_iteration_once_on_torchs_threads(name, clang, threads, tmp_path):
    target = tmp_path / "loops.so"
    compile_library(clang, LOOPS, target, ())
    library._share_openmp()
    loops = ctypes.CDLL(str(target))
    for number in (1, 2, 3, 5):
        threads(number)
        for count in (0, 1, 2, 3, 4, 7, 16, 1001):
            done = torch.zeros(max(count, 1), dtype=torch.int32)
            loops[name](ctypes.c_void_p(done.data_ptr()), ctypes.c_int64(count))
            assert done[:count].tolist() == [1] * count, (number, count)


@pytest.mark.thorough
@pytest.mark.timeout(3600)
def test_every_kernel_compiles_for_every_level(clang, tmp_path):
    for level in levels_of_machine():
        for source in sources():
            compile_library(clang, source, tmp_path / f"{source.stem}-{level.name}.so", (*level.flags, *STRICT))


@pytest.mark.thorough
@pytest.mark.timeout(3600)
def test_the_numerical_tests_pass_with_clang(clang):
    for source in sources():
        assert library.built(source, ("-march=native",)).is_file()
    command = (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *NUMERICAL)
    variables = os.environ | {"OMP_NUM_THREADS": "2"}
    done = subprocess.run(command, cwd=ROOT / "tests", env=variables, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
