"""Runs other projects' clients, unmodified, against a server: `python -m tools.check_clients --install`.

Without `--url` it starts a server on the demo model, with two ranks, and stops it at the end. Each client runs in a
virtual environment of its own; `--install` makes those that are missing, with the versions below. Without it, clients
run whose environment was made before, or which this interpreter has. No client looks for anything outside this machine.
Prints what each check found and one line per client; exits with 1 if a check failed that should not.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

from benchmarks.compare_peers.environments import Recipe, UnavailableError, prepare_recipe, python_of
from benchmarks.serve_processes import server
from tools.clients.checking import json_lines
from ulysses_infer.cache_folders import cache_folder
from ulysses_infer.child_processes import end_children_with_this_process

ROOT = Path(__file__).resolve().parents[1]
SECONDS = 1800.0  # for all checks of a client
PASSED, FAILED, DECLINED = "passed", "FAILED", "declined"
SETTINGS = (
    "parallel.sp=2",
    "model.seed=1",
    "model.override_generation_config={temperature: 0}",
    "server.heartbeat_timeout=60",
)
"""Greedy unless a request says otherwise, so that results repeat; and patient, because clients use the cores, too."""


@dataclass(frozen=True)
class Client:
    """One project's client."""

    package: str
    version: str
    program: str
    """The module in `tools.clients` that checks it."""
    extra: str = ""
    others: tuple[str, ...] = ()
    """Further packages that its checks need."""

    @property
    def recipe(self) -> Recipe:
        """Its environment."""
        return Recipe(((f"{self.package}{self.extra}=={self.version}", *self.others),))


CLIENTS = (
    Client("openai", "3.57.0", "openai_sdk"),
    Client("anthropic", "2.14.0", "anthropic_sdk"),
    Client("litellm", "1.110.2", "litellm_sdk"),
    Client("llm-comply", "0.5.0", "llm_comply"),
    Client("lm_eval", "0.4.13", "lm_eval_runs", "[api]", ("transformers==5.23.0", "datasets")),
    Client("guidellm", "0.8.1", "guidellm_runs"),
    Client("aiperf", "0.13.0", "aiperf_runs"),
)
REASONS = {
    "image": "the server reads only text",
    "model": "a request without a model gets the served one",
}
DECLINES = {
    "open-responses: image-input": REASONS["image"],
    "openai-chat: chat-image-input": REASONS["image"],
    "anthropic: anth-image-input": REASONS["image"],
    "open-responses: error-handling": REASONS["model"],
    "openai-chat: chat-error-handling": REASONS["model"],
}
"""Checks that fail on purpose: what they ask for is not offered."""


@dataclass(frozen=True)
class Result:
    """One check."""

    client: str
    check: str
    error: str | None

    @property
    def outcome(self) -> str:
        """passed, FAILED or declined."""
        if self.error is None:
            return PASSED
        return DECLINED if self.check in DECLINES else FAILED

    @property
    def line(self) -> str:
        """For a person."""
        reason = DECLINES.get(self.check) if self.outcome == DECLINED else self.error
        return f"{self.outcome:8}  {self.client}: {self.check}{': ' if reason else ''}{reason or ''}"


def main() -> None:
    """Run the clients; exits with 1 if a check failed."""
    end_children_with_this_process()
    options = parse()
    given = nullcontext((None, options.url.rstrip("/")))
    results: list[Result] = []
    with given if options.url else server([options.model, *SETTINGS]) as (_, url):
        for client, python in available(options):
            for result in results_of(client, python, url, options.model):
                print(result.line, flush=True)
                results.append(result)
    print(f"\n{table(results)}")
    sys.exit(1 if not results or any(result.outcome == FAILED for result in results) else 0)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="", help="a running server, without /v1; default: one is started")
    parser.add_argument("--model", default=str(ROOT / "models" / "demo"), help="checkpoint to serve, or that is served")
    names = [client.package for client in CLIENTS]
    parser.add_argument("--only", nargs="+", choices=names, metavar="CLIENT", help=f"some of: {', '.join(names)}")
    parser.add_argument("--install", action="store_true", help="make the environments that are missing")
    parser.add_argument(
        "--environments", type=Path, default=cache_folder("clients"), help="folder for them (default: in the cache)"
    )
    return parser.parse_args()


def available(options: argparse.Namespace) -> Iterator[tuple[Client, Path]]:
    """The clients that can run, each with its interpreter."""
    for client in CLIENTS:
        if client.package in (options.only or [client.package]):
            try:
                yield client, interpreter_of(client, options.environments / client.package, options.install)
            except UnavailableError as error:
                print(f"left out  {client.package}: {error}", flush=True)


def interpreter_of(client: Client, folder: Path, installs: bool) -> Path:
    """The interpreter that has the client. Raises `UnavailableError`."""
    if installs:
        return prepare_recipe(client.recipe, folder)
    if python_of(folder).exists():
        return python_of(folder)
    try:
        importlib.metadata.version(client.package)
    except importlib.metadata.PackageNotFoundError:
        raise UnavailableError("it is not installed; add --install") from None
    return Path(sys.executable)


def results_of(client: Client, python: Path, url: str, model: str) -> Iterator[Result]:
    """Run a client's program; yields the results, the last one an error if it did not end well."""
    with tempfile.TemporaryDirectory() as folder:
        path, log = Path(folder) / "results", Path(folder) / "log"
        path.touch()
        arguments = [url, served_name(url), str(Path(model).resolve()), str(path)]
        status = run([str(python), "-m", f"tools.clients.{client.program}", *arguments], log)
        for found in json_lines(path.read_text(encoding="utf-8")):
            yield Result(client.package, found["check"], found["error"])
        if status:
            lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
            yield Result(client.package, "ends well", f"{status}: {(lines or [''])[-1]}")


def run(command: Sequence[str], log: Path) -> str:
    """Run a program; returns what went wrong, if anything did."""
    variables = {**os.environ, "PYTHONPATH": str(ROOT)}
    with log.open("wb") as output:
        try:
            done = subprocess.run(
                command, cwd=ROOT, env=variables, stdout=output, stderr=subprocess.STDOUT, timeout=SECONDS, check=False
            )
        except subprocess.TimeoutExpired:
            return f"it took more than {SECONDS:g} s"
    return f"status {done.returncode}" if done.returncode else ""


def served_name(url: str) -> str:
    """The name of the model that a server serves. Raises `OSError` if there is no server."""
    with urllib.request.urlopen(f"{url}/v1/models", timeout=60) as answer:
        return str(json.load(answer)["data"][0]["id"])


def table(results: Sequence[Result]) -> str:
    """One line per client."""
    lines = [f"{'client':12} {PASSED:>8} {'failed':>8} {DECLINED:>8}"]
    for client in CLIENTS:
        outcomes = [result.outcome for result in results if result.client == client.package]
        if outcomes:
            counts = " ".join(f"{outcomes.count(kind):8}" for kind in (PASSED, FAILED, DECLINED))
            lines.append(f"{client.package:12} {counts}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
