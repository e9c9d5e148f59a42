"""A wheel brings compiled kernels, which its users get without a compiler."""

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

from ulysses_infer.native.compiler import sources
from ulysses_infer.native.levels import levels_here, levels_of_machine

ROOT = Path(__file__).parents[2]
NAMES = [path.stem for path in sources()]
USE = """
import sys
import torch
from ulysses_infer.native import library
from ulysses_infer.native.matmul import NativeMatmul
for name in sys.argv[1:]:
    library.open_library(name)
    print(library.library_path(name))
x, weight = torch.randn(20, 64), torch.randn(30, 64)
torch.testing.assert_close(NativeMatmul()(x, weight), torch.nn.functional.linear(x, weight))
"""


def run(*command, **options):
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options
    done = subprocess.run(command, text=True, check=False, **pipes)
    assert done.returncode == 0, f"{done.stdout}{done.stderr}"
    return done.stdout


@pytest.mark.thorough
@pytest.mark.timeout(1200)
@pytest.mark.skipif(not shutil.which("cc") or not levels_here(), reason="needs a C compiler to build the wheel")
def test_a_wheel_runs_its_compiled_kernels_where_there_is_no_compiler(tmp_path):
    source, made = tmp_path / "source", tmp_path / "venv"
    source.mkdir()
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(ROOT / "ulysses_infer", source / "ulysses_infer", ignore=shutil.ignore_patterns("__pycache__"))
    pip = (sys.executable, "-m", "pip")
    newest, best, oldest = levels_of_machine()[0].name, levels_here()[0].name, levels_here()[-1].name
    variables = os.environ | {"ULYSSES_INFER_BUILD_LEVELS": f"{newest},{best},{oldest}"}
    run(*pip, "wheel", "--no-build-isolation", "--no-deps", "-w", str(tmp_path), str(source), env=variables)
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.endswith(f"-py3-none-linux_{os.uname().machine}.whl")
    venv.create(made, system_site_packages=True)
    run(*pip, "--python", str(made / "bin/python"), "install", "--no-deps", "--no-index", str(wheel))
    (packages,) = made.glob("lib/python*/site-packages")
    (packages / "those_of_the_tests.pth").write_text(sysconfig.get_path("purelib"))  # torch and so on
    python, built = str(made / "bin/python"), packages / "ulysses_infer/native/built"
    alone = {"PATH": str(made / "bin"), "HOME": str(tmp_path), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    for level, changes in ((best, {}), (oldest, {"ULYSSES_INFER_NATIVE_LEVEL": oldest})):
        used = run(python, "-c", USE, *NAMES, cwd=tmp_path, env=alone | changes)
        assert used.split() == [str(built / level / f"{name}.so") for name in NAMES]
    demo = ("-m", "ulysses_infer.cli.main", "generate", "--config", str(ROOT / "recipes/demo.yaml"))
    output = run(python, *demo, cwd=tmp_path, env=alone, stderr=subprocess.STDOUT)
    assert "TP 2" in output
    assert "no native kernels" not in output
