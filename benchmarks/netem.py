"""Compares kinds of parallelism over links with a given bandwidth and delay, on one machine.

    sudo python -m benchmarks.netem --rate 1gbit --delay 50us MODEL --protocol shape --output FOLDER
    sudo python -m benchmarks.netem --rate 1gbit --bench rollouts --random-model llama-60m parallel.sp=2

Every rank gets a network namespace with its own veth to a common bridge; its outgoing traffic is limited (tc tbf) and
delayed (tc netem). `ulysses-infer bench compare` runs in the first namespace with the given options, and its servers
run with one rank in each namespace, as on separate nodes. So do the ranks of another benchmark (`--bench`). Needs root
and iproute2. The namespaces are always removed at the end; after SIGKILL the next run removes them.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

from ulysses_infer.cache_folders import cache_folder
from ulysses_infer.child_processes import end_children_with_this_process
from ulysses_infer.job.processes import free_port

ROOT = Path(__file__).resolve().parents[1]
LAUNCH = ROOT / "ulysses_infer" / "launch.py"
PREFIX = "ulysses"
INTERFACE = "wire"
BRIDGE = "bridge"
NETWORK = "10.77.0"
END_SECONDS = 45.0
POLL_SECONDS = 0.2
OVER_THE_LINK = "runtime.collectives=torch"  # ranks on one host would use shared memory by default
LEAST_BURST = 256 * 1024  # bytes: several of the kernel's largest packets
TICKS_PER_SECOND = 250  # a bucket must hold what passes between two ticks of the kernel's clock
COMPARE, BENCHMARKS = "compare", ("latency", "throughput", "rollouts")
UNITS = {"kbit": 1e3, "mbit": 1e6, "gbit": 1e9}


class NetemError(Exception):
    """A missing prerequisite, in one line."""


# -- namespaces --------------------------------------------------------------------------------------------------


@contextmanager
def namespaces(count: int, rate: str | None, delay: str | None) -> Iterator[list[str]]:
    """`count` namespaces, connected by a bridge in another one; on exit they and their processes are removed."""
    names = [f"{PREFIX}-{os.getpid()}-{number}" for number in range(count)]
    switch = f"{PREFIX}-{os.getpid()}-switch"
    try:
        _make(switch)
        _ip("-n", switch, "link", "add", BRIDGE, "type", "bridge")
        _ip("-n", switch, "link", "set", BRIDGE, "up")
        for number, name in enumerate(names):
            _make(name)
            _join(name, number, switch)
            _shape(name, rate, delay)
        yield names
    finally:
        remove([*names, switch])


def _make(name: str) -> None:
    _ip("netns", "add", name)
    _ip("-n", name, "link", "set", "lo", "up")


def _join(name: str, number: int, switch: str) -> None:
    """Connect a namespace to the bridge."""
    port = f"port{number}"
    _ip("-n", name, "link", "add", INTERFACE, "type", "veth", "peer", "name", port, "netns", switch)
    _ip("-n", name, "addr", "add", f"{address(number)}/24", "dev", INTERFACE)
    _ip("-n", name, "link", "set", INTERFACE, "up")
    _ip("-n", switch, "link", "set", port, "master", BRIDGE, "up")


def _shape(name: str, rate: str | None, delay: str | None) -> None:
    """Limit and delay a namespace's outgoing traffic. Raises `NetemError` if this kernel does not support it."""
    parent = ["root"]
    if rate is not None:
        _tc(name, parent, "1:", "tbf", "rate", rate, "burst", str(burst_bytes(rate)), "latency", "50ms")
        parent = ["parent", "1:1"]
    if delay is not None:
        _tc(name, parent, "10:", "netem", "delay", delay, "limit", "100000")


def _tc(name: str, parent: Sequence[str], handle: str, kind: str, *words: str) -> None:
    place = [*parent, "handle", handle]
    done = _run("ip", "netns", "exec", name, "tc", "qdisc", "add", "dev", INTERFACE, *place, kind, *words)
    if done.returncode != 0:
        option = "--delay" if kind == "netem" else "--rate"
        raise NetemError(f"this kernel does not support `tc qdisc {kind}` ({_last_line(done)}); leave {option} out")


def remove(names: Sequence[str]) -> None:
    """Kill the processes in these namespaces and delete them; missing ones are ignored."""
    for name in names:
        for pid in _run("ip", "netns", "pids", name).stdout.split():
            with suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
        _run("ip", "netns", "delete", name)


def remove_leftovers() -> None:
    """Delete the namespaces of runs whose process has ended."""
    listed = [line.split()[0] for line in _run("ip", "netns", "list").stdout.splitlines() if line.strip()]
    owners = {name: re.fullmatch(rf"{PREFIX}-(\d+)-\w+", name) for name in listed}
    remove([name for name, match in owners.items() if match and not psutil.pid_exists(int(match[1]))])


def address(number: int) -> str:
    """IP address of a rank's namespace."""
    return f"{NETWORK}.{number + 1}"


def burst_bytes(rate: str) -> int:
    """Size of the token bucket for a rate."""
    number, unit = re.fullmatch(r"([\d.]+)([a-z]+)", rate).groups()  # type: ignore[union-attr]
    return max(LEAST_BURST, int(float(number) * UNITS[unit] / 8 / TICKS_PER_SECOND))


def _ip(*words: str) -> None:
    done = _run("ip", *words)
    if done.returncode != 0:
        raise NetemError(f"`ip {' '.join(words)}` failed: {_last_line(done)}")


def _run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True)


def _last_line(done: subprocess.CompletedProcess[str]) -> str:
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    return lines[-1] if lines else f"status {done.returncode}"


# -- a server with one rank in each namespace ----------------------------------------------------------------------


def launch(names: Sequence[str], arguments: Sequence[str]) -> int:
    """Run a command on one rank in each namespace; returns the exit status of the first rank that ends.

    If it ends well, the others have time to do so.
    """
    with tempfile.NamedTemporaryFile("w", suffix=".hosts") as hosts, cache_without_profiles() as cache:
        hosts.writelines(f"{name} slots=1\n" for name in names)
        hosts.flush()
        common = [sys.executable, "-m", "deepspeed.launcher.runner", "--log_level", "critical", "--no_ssh"]
        command = [str(LAUNCH), *arguments, OVER_THE_LINK]
        common += ["--hostfile", hosts.name, "--master_addr", address(0), "--master_port", str(free_port())]
        nodes = [
            subprocess.Popen(
                ["ip", "netns", "exec", name, *common, "--node_rank", str(rank), *command],
                env=rank_environment(len(names), cache),
                start_new_session=True,
            )
            for rank, name in enumerate(names)
        ]
        try:
            return _first_status(nodes)
        finally:
            _end(nodes)


@contextmanager
def cache_without_profiles() -> Iterator[str]:
    """A cache folder with the user's compiled kernels and models, but without step times: those are of another link."""
    with tempfile.TemporaryDirectory() as folder:
        own = Path(folder) / "ulysses_infer"
        own.mkdir()
        for kind in ("native", "models", "gguf"):
            cache_folder(kind).mkdir(parents=True, exist_ok=True)
            (own / kind).symlink_to(cache_folder(kind))
        yield folder


def rank_environment(count: int, cache: str) -> dict[str, str]:
    """Environment of one of `count` ranks on this machine; its collectives use the link. cache: its cache folder."""
    threads = str(max(1, len(os.sched_getaffinity(0)) // count))
    own = {"GLOO_SOCKET_IFNAME": INTERFACE, "XDG_CACHE_HOME": cache}
    return {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": threads, **os.environ, **own}


def _first_status(nodes: Sequence[subprocess.Popen[bytes]]) -> int:
    while True:
        for node in nodes:
            status = node.poll()
            if status is not None:
                if status == 0:
                    _wait(nodes)
                return status
        time.sleep(POLL_SECONDS)


def _wait(nodes: Sequence[subprocess.Popen[bytes]]) -> None:
    """Until all have ended, for at most `END_SECONDS`."""
    deadline = time.monotonic() + END_SECONDS
    while time.monotonic() < deadline and any(node.poll() is None for node in nodes):
        time.sleep(POLL_SECONDS)


def _end(nodes: Sequence[subprocess.Popen[bytes]]) -> None:
    """Send SIGTERM to all, wait until they have drained, then kill the rest."""
    _signal(nodes, signal.SIGTERM)
    _wait(nodes)
    _signal(nodes, signal.SIGKILL)
    for node in nodes:
        node.wait()


def _signal(nodes: Sequence[subprocess.Popen[bytes]], number: int) -> None:
    for node in nodes:
        with suppress(ProcessLookupError):
            os.killpg(node.pid, number)


# -- command line ------------------------------------------------------------------------------------------------


def main() -> None:
    """Create the namespaces, run the comparison, clean up."""
    end_children_with_this_process()
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # so that everything is removed
    signal.signal(signal.SIGHUP, lambda number, frame: sys.exit(128 + number))
    if sys.argv[1:2] == ["launch"]:
        given, count, *arguments = sys.argv[2:]
        sys.exit(launch(given.split(",")[: int(count)], arguments))
    options, rest = _parser().parse_known_args()
    try:
        check_possible()
        remove_leftovers()
        with namespaces(options.ranks, options.rate, options.delay) as names:
            sys.exit(_compare(names, options, rest) if options.bench == COMPARE else _bench(names, options, rest))
    except NetemError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)


def check_possible() -> None:
    """Raise `NetemError` if a prerequisite is missing that only the user can provide."""
    if os.geteuid() != 0:
        raise NetemError("network namespaces need root; run this with sudo")
    for program in ("ip", "tc"):
        if shutil.which(program) is None:
            raise NetemError(f"there is no `{program}`; install the package iproute2")


def _bench(names: Sequence[str], options: argparse.Namespace, rest: Sequence[str]) -> int:
    print(f"link: {_link(options)}", flush=True)
    return launch(names, ["bench", options.bench, *rest])


def _link(options: argparse.Namespace) -> str:
    return f"{options.rate or 'unlimited'}, {options.delay or 'no'} delay"


def _compare(names: Sequence[str], options: argparse.Namespace, rest: Sequence[str]) -> int:
    starter = shlex.join([sys.executable, str(Path(__file__).resolve()), "launch", ",".join(names)])
    command = [
        "ip",
        "netns",
        "exec",
        names[0],
        sys.executable,
        "-m",
        "ulysses_infer.cli.main",
        "bench",
        "compare",
        *rest,
    ]
    command += ["--ranks", str(len(names)), "--launch", starter, "--note", f"link={_link(options)}"]
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    process = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": path})
    try:
        return process.wait()
    finally:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(END_SECONDS)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        usage="netem.py [--rate RATE] [--delay TIME] [--ranks N] [--bench NAME] [MODEL] [options of the benchmark]",
    )
    parser.add_argument(
        "--rate", type=_rate, metavar="RATE", help="bandwidth per link and direction, such as 1gbit or 100mbit"
    )
    parser.add_argument("--delay", type=_delay, metavar="TIME", help="one-way delay, such as 50us or 1ms")
    parser.add_argument("--ranks", type=int, choices=range(2, 65), metavar="N", default=2, help="default: 2")
    parser.add_argument("--bench", choices=(COMPARE, *BENCHMARKS), default=COMPARE, help=f"default: {COMPARE}")
    return parser


def _rate(text: str) -> str:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([a-z]+)", text.lower())
    if match is None or match[2] not in UNITS or float(match[1]) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a rate such as 1gbit; units are {', '.join(UNITS)}")
    return text.lower()


def _delay(text: str) -> str:
    if re.fullmatch(r"\d+(\.\d+)?(us|ms|s)", text) is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not a time such as 50us or 1ms")
    return text


if __name__ == "__main__":
    main()
