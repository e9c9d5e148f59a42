"""From a fresh clone to a running engine: `python3 tools/run.py demo` or `python3 tools/run.py test`.

Both first create a virtual environment, in .venv or the folder that the variable ULYSSES_VENV names; later runs reuse
it. `demo` runs recipes/demo.yaml on two ranks; append overrides such as policy.threshold_tokens=4. `test` runs the
formatter and linter (as checks), the type checker and the tests. `test --thorough` adds the tests marked `thorough`,
which are more cases of the same kinds. Other arguments are passed to pytest.

On a machine with NVIDIA GPUs torch's build for CUDA and the extra `gpu` are installed. `--index-url URL` installs torch
from that package index, for a driver that is too old for the default build.

Needs only Python 3.11 or newer, with its standard library, and gcc or clang.
"""

from __future__ import annotations

import collections
import hashlib
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

if not __package__:  # started by path
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tools.gpu_driver import find_driver, has_nvidia_gpu, misfit, tag_of
from ulysses_infer.child_processes import end_children_with_this_process

ROOT = Path(__file__).resolve().parents[1]
TORCH = "torch==2.13.0"  # the release the engine is developed on
EXTRAS: dict[str, set[str]] = {"demo": set(), "test": {"serve", "bench", "train", "test"}}
CHECKS = (["ruff", "format", "--check", "."], ["ruff", "check", "."], ["mypy"])
PYTEST = ["pytest", "--durations=10"]
IN_PARALLEL = ["--numprocesses=2", "--dist=loadscope", "--no-loadscope-reorder"]  # groups: tests/conftest.py
THOROUGH = "--thorough"
INDEX_URL = "--index-url"


def main() -> None:
    """Run the command; exits with its status."""
    command, (index_url, arguments) = (sys.argv[1:2] or [""])[0], take_index_url(sys.argv[2:])
    if command not in EXTRAS:
        print(__doc__)
        sys.exit(0 if command in ("-h", "--help") else 2)
    check_machine()
    end_children_with_this_process()
    environment = Environment(Path(os.environ.get("ULYSSES_VENV") or ROOT / ".venv").resolve())
    environment.prepare(command, index_url)
    os.chdir(ROOT)
    if command == "demo":
        run_demo(environment, arguments)
    else:
        run_tests(environment, arguments)


def check_machine() -> None:
    """Exit with one line if a prerequisite is missing."""
    if sys.version_info < (3, 11):
        fail(f"Python 3.11 or newer is needed, this is {sys.version.split()[0]}; run this with a newer python3")
    if not any(map(shutil.which, ("gcc", "clang"))):
        fail("gcc or clang is needed and not found; install one, for example with the package build-essential")
    try:
        import ensurepip  # noqa: F401
    except ImportError:
        fail("Python's venv is incomplete (no ensurepip); install the package python3-venv")


def take_index_url(arguments: list[str]) -> tuple[str | None, list[str]]:
    """The value of `--index-url`, or None, and the other arguments."""
    joined = [word for word in arguments if word.startswith(f"{INDEX_URL}=")]
    if joined:
        return joined[-1].partition("=")[2], [word for word in arguments if word not in joined]
    if INDEX_URL not in arguments:
        return None, arguments
    place = arguments.index(INDEX_URL)
    if place + 1 == len(arguments):
        fail(f"{INDEX_URL} needs the address of a package index")
    return arguments[place + 1], arguments[:place] + arguments[place + 2 :]


def torch_build(index_url: str) -> str:
    """The requirement for pip of torch from an index: the build of its CUDA tag, if the address ends in one."""
    tag = tag_of(index_url)
    return f"{TORCH}+{tag}" if tag else TORCH


def extras_of(command: str) -> set[str]:
    """The extras of the package that `command` needs on this machine."""
    return EXTRAS[command] | ({"gpu"} if has_nvidia_gpu() else set())


def check_driver(index_url: str | None) -> None:
    """Exit with one line if the NVIDIA driver cannot run the build of torch that would be installed."""
    driver = find_driver()
    problem = misfit(driver, TORCH, index_url) if driver is not None else None
    if problem is not None:
        fail(problem)


class Environment:
    """The virtual environment: torch, the package in editable mode and the extras of a command."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.bin = folder / "bin"
        pyproject = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
        contents = f"{pyproject}{self.torch_requirement()}{sys.version}{ROOT}"
        self.fingerprint = hashlib.sha256(contents.encode()).hexdigest()

    @staticmethod
    def torch_requirement() -> str:
        """The requirement for pip: the CPU build if available, but never on a machine with NVIDIA GPUs."""
        version = TORCH.partition("==")[2]
        return f"{TORCH},!={version}+cpu" if has_nvidia_gpu() else TORCH

    def stamp(self, command: str) -> Path:
        """The file that contains the fingerprint once everything for `command` is installed."""
        return self.folder / f".ready-for-{command}"

    def is_ready(self, command: str) -> bool:
        """Whether an earlier run installed everything for `command`."""
        stamp = self.stamp(command)
        return stamp.is_file() and stamp.read_text() == self.fingerprint

    def prepare(self, command: str, index_url: str | None = None) -> None:
        """Create the environment and install what `command` needs, unless already done.

        index_url: package index for torch; torch is then installed again.
        """
        if self.is_ready(command) and index_url is None:
            return
        check_driver(index_url)
        if not (self.bin / "python").exists():
            say(f"creating a virtual environment in {self.folder}")
            subprocess.run([sys.executable, "-m", "venv", "--clear", str(self.folder)], check=True)
        if index_url is None:
            self.pip_install(self.torch_requirement())
        else:
            self.pip_install(INDEX_URL, index_url, torch_build(index_url))
        extras = extras_of(command)
        self.pip_install("-e", f"{ROOT}[{','.join(sorted(extras))}]" if extras else str(ROOT))
        for name in EXTRAS:
            if extras_of(name) <= extras:
                self.stamp(name).write_text(self.fingerprint)

    def pip_install(self, *requirement: str) -> None:
        """Install, showing pip's latest line on a terminal; on failure, exit with its last lines.

        The last argument is the requirement; options of pip precede it.
        """
        say(f"installing {requirement[-1]} (this can take some minutes)")
        command = [str(self.bin / "python"), "-m", "pip", "install", "--progress-bar=off", *requirement]
        pip = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        assert pip.stdout is not None
        last_lines: collections.deque[str] = collections.deque(maxlen=15)
        for line in pip.stdout:
            last_lines.append(line)
            show_progress(line)
        show_progress("")
        if pip.wait() != 0:
            sys.stderr.writelines(last_lines)
            fail(f"pip could not install {requirement[-1]}; its last lines are above")

    def variables(self) -> dict[str, str]:
        """The environment variables for a process in this environment."""
        path = f"{self.bin}{os.pathsep}{os.environ.get('PATH', '')}"
        variables = {**os.environ, "VIRTUAL_ENV": str(self.folder), "PATH": path}
        variables.pop("PYTHONHOME", None)
        return variables

    def count_gpus(self) -> int:
        """GPUs that the installed torch can use."""
        code = "import torch; print(torch.cuda.device_count())"
        command = [str(self.bin / "python"), "-c", code]
        result = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=self.variables())
        return int(result.stdout)


def run_demo(environment: Environment, overrides: list[str]) -> None:
    """Replace this process by the demo's launcher: on two GPUs if available, else on two CPU ranks of one thread."""
    variables = environment.variables()
    gpus = environment.count_gpus()
    if gpus < 2:
        variables = cpu_variables(variables)
    if gpus == 1:
        overrides = ["runtime.device=cpu", *overrides]
    launcher = ["deepspeed", "--master_port", str(free_port()), "--num_gpus", "2"]
    command = [*launcher, "ulysses_infer/launch.py", "generate", "--config", "recipes/demo.yaml", *overrides]
    say(" ".join(command))
    os.execvpe(str(environment.bin / "deepspeed"), command, variables)


def run_tests(environment: Environment, arguments: list[str]) -> None:
    """Run the checks in order; exits with the status of the first that fails."""
    variables, tests = environment.variables(), [*PYTEST, *selection(arguments)]
    if environment.count_gpus() == 0:
        variables, tests = cpu_variables(variables), [*PYTEST, *IN_PARALLEL, *selection(arguments)]
    for command in (*CHECKS, tests):
        say(" ".join(command))
        status = subprocess.run([environment.bin / command[0], *command[1:]], env=variables, check=False).returncode
        if status != 0:
            sys.exit(status)


def selection(arguments: list[str]) -> list[str]:
    """The user's arguments for pytest; `--thorough` removes the default selection of tests."""
    everything = ["-m", ""] if THOROUGH in arguments else []
    return [*everything, *(argument for argument in arguments if argument != THOROUGH)]


def cpu_variables(variables: dict[str, str]) -> dict[str, str]:
    """`variables` for ranks on the CPU with one thread each; by default every rank would use all cores."""
    return {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", **variables}


def free_port() -> int:
    """A free TCP port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def show_progress(line: str) -> None:
    """On a terminal, replace the previous line by `line`."""
    if sys.stdout.isatty():
        width = shutil.get_terminal_size().columns - 1
        print("\r" + line.strip()[:width].ljust(width), end="\r", flush=True)


def say(text: str) -> None:
    """Announce the next action."""
    print(f"==> {text}", flush=True)


def fail(message: str) -> None:
    """Exit with one line."""
    sys.exit(f"error: {message}")


if __name__ == "__main__":
    main()
