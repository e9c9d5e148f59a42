"""The `bench compare` command: starts the servers, measures the machine, runs all cases, writes the report."""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import os
import platform
import shlex
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from ulysses_infer.bench.compare.contenders import (
    CONTENDERS,
    GROUP,
    REPLICAS,
    Contender,
    policy_of,
    speculating,
)
from ulysses_infer.bench.compare.findings import CaseInfo, Findings, load_findings
from ulysses_infer.bench.compare.measuring import Site, measure
from ulysses_infer.bench.compare.protocols import (
    PROTOCOLS,
    SATURATED,
    SCALES,
    Capacity,
    ComparisonCase,
    ProtocolInputs,
    WorkloadSizes,
    shape,
)
from ulysses_infer.bench.compare.servers import Servers, serve_command, server_overrides
from ulysses_infer.bench.compare.tables import print_findings, write_csv
from ulysses_infer.bench.random_model import random_model
from ulysses_infer.bench.serve.serve_bench import event_loop_factory
from ulysses_infer.config import Config, load_config
from ulysses_infer.console.screen import make_console
from ulysses_infer.errors import ConfigError, RequestError
from ulysses_infer.extras import require_extra

SMALLEST_VOCABULARY = 99  # for models that do not declare their size
WARM_UP = -1  # number of the repeat that is not counted


def run(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    """Measure, or read earlier results; then print and write the report. Returns the exit status.

    Raises one-line `UlyssesError`s.
    """
    require_extra("bench compare", "bench")
    if not options.redraw:
        require_extra("a server of bench compare", "serve")
    console = make_console(0)
    if options.redraw:
        findings = load_findings(options.output)
    else:
        options.output.mkdir(parents=True, exist_ok=True)
        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # so that servers are ended too
        comparison = Comparison(options, overrides, console)
        try:
            with asyncio.Runner(loop_factory=event_loop_factory()) as runner:
                runner.run(comparison.run())
        except KeyboardInterrupt:
            console.print("interrupted: these are the results so far")
        finally:
            comparison.findings.save(options.output)  # for --redraw, however the run ends
        findings = comparison.findings
    return report(findings, options.output, console)


def report(findings: Findings, folder: Path, console: Console) -> int:
    """Print and write the findings; returns the exit status: 1 if there are none."""
    from ulysses_infer.bench.compare.report import write_report

    print_findings(console, findings)
    findings.save(folder)
    write_csv(findings, folder)
    path = write_report(findings, folder)
    console.print(f"\nreport: {path}", highlight=False)
    return 0 if findings.runs else 1


class Comparison:
    """One comparison, from its options to its findings."""

    def __init__(self, options: argparse.Namespace, overrides: Sequence[str], console: Console) -> None:
        self._options, self._console = options, console
        self._overrides = list(overrides)
        if options.random_model is not None:
            self._overrides.append(f"model.path={random_model(options.random_model)}")
        self._config = load_config(options.config, self._overrides)
        self._num_ranks = options.ranks or max(2, self._config.parallel.world_size)
        self._contenders = [CONTENDERS[name] for name in CONTENDERS if name in options.contenders]
        self._contenders += map(speculating, options.speculation)
        self._sites: dict[str, Site] = {}
        self.findings = Findings(_about(options, self._config, self._num_ranks))

    async def run(self) -> None:
        """Measure everything. Raises `ConfigError` if a server does not start or no contender is left."""
        options = self._options
        names = {contender.server for contender in self._contenders}
        commands = {name: self._command(name) for name in names}
        with Servers(commands, options.output, options.in_turn) as servers:
            try:
                await self._compare(servers)
            except OSError as error:
                raise ConfigError(f"a server has ended ({error}); its log is in '{options.output}'") from error

    async def _compare(self, servers: Servers) -> None:
        capacity = await self._warm_up(servers)
        inputs = await self._protocol_inputs(servers, capacity)
        cases = [case for name in self._options.protocol for case in PROTOCOLS[name].cases(inputs)]
        self.findings.cases = [_info(case) for case in cases]
        self.findings.contenders = [contender.name for contender in self._contenders]
        await self._measure(servers, cases)

    def _command(self, server: str) -> list[str]:
        options = self._options
        is_adaptive = any(contender.name == "adaptive" for contender in self._contenders)
        is_alone = options.in_turn or len({contender.server for contender in self._contenders}) == 1
        keys = server_overrides(server, self._config, self._num_ranks, is_adaptive, is_alone)
        recipe = ["--config", str(options.config)] if options.config is not None else []
        arguments = [*recipe, *self._overrides, *(f"{key}={value}" for key, value in keys.items())]
        return serve_command(options.launch, self._num_ranks, arguments)

    async def _site(self, servers: Servers, contender: Contender) -> Site:
        """The contender's server with its policy set. Raises `RequestError` if the server refuses the policy."""
        server = servers.get(contender.server)
        if contender.server not in self._sites or self._sites[contender.server].client is not server.client:
            self._sites[contender.server] = await Site.of(server.client, _vocab_size(self._config))
        site = self._sites[contender.server]
        await site.set_policy(policy_of(contender, self._config.policy.threshold_tokens))
        return site

    async def _warm_up(self, servers: Servers) -> Capacity:
        """Run the saturated shape once per contender; the capacity is the best result.

        Contenders whose policy the server refuses are excluded.
        """
        capacity = Capacity(0.0, 0.0)
        for contender in list(self._contenders):
            self._console.print(f"warming up {contender.name} ({contender.title})", style="dim", highlight=False)
            try:
                site = await self._site(servers, contender)
            except RequestError as error:
                self._contenders.remove(contender)
                self.findings.refused[contender.name] = str(error)
                continue
            inputs = await self._protocol_inputs(servers, capacity, site)
            for case in shape(inputs):
                done = await measure(site, case, contender.name, WARM_UP)
                if case.kind == SATURATED and done.metrics:
                    found = Capacity(done.metrics["requests_per_second"], done.metrics["tokens_per_second"])
                    capacity = max(capacity, found, key=lambda each: each.tokens)
        if not capacity.tokens:
            reasons = "; ".join(self.findings.refused.values()) or "every request failed"
            raise ConfigError(f"nothing could be measured: {reasons}")
        self.findings.about["capacity"] = dataclasses.asdict(capacity)
        return capacity

    async def _protocol_inputs(self, servers: Servers, capacity: Capacity, site: Site | None = None) -> ProtocolInputs:
        """The inputs of the protocols, with lengths limited to the model's maximum length."""
        site = site or await self._site(servers, self._contenders[0])
        card = (await site.client.call("GET", "/v1/models"))["data"][0]
        sizes = sizes_of(self._options).fitting(card["max_model_len"])
        return ProtocolInputs(sizes, capacity, card["max_model_len"], self._options.trace)

    async def _measure(self, servers: Servers, cases: Sequence[ComparisonCase]) -> None:
        with _progress(self._console) as progress:
            total = self._options.repeats * len(cases) * len(self._contenders)
            task = progress.add_task("measuring", total=total)
            for repeat, case, contender in order(cases, self._contenders, self._options.repeats, self._options.in_turn):
                progress.update(task, description=f"{case.name}, {contender.name}")
                site = await self._site(servers, contender)
                self.findings.runs.append(await measure(site, case, contender.name, repeat))
                progress.advance(task)


def order(
    cases: Sequence[ComparisonCase], contenders: Sequence[Contender], repeats: int, in_turn: bool
) -> Iterator[tuple[int, ComparisonCase, Contender]]:
    """The order of runs: all contenders run a case before the next case starts, in an order that differs per repeat.

    With one server at a time, all cases run on it before the next server starts.
    """
    names = tuple(dict.fromkeys((GROUP, REPLICAS, *(each.server for each in contenders)))) if in_turn else (None,)
    for repeat in range(repeats):
        first = repeat % len(contenders)
        turned = [*contenders[first:], *contenders[:first]]
        for server in names:
            for case in cases:
                for contender in turned:
                    if server in (None, contender.server):
                        yield repeat, case, contender


def sizes_of(options: argparse.Namespace) -> WorkloadSizes:
    """The sizes of the scale, changed by the options."""
    given = {"input_len": options.input_len, "output_len": options.output_len, "seconds": options.seconds}
    return dataclasses.replace(SCALES[options.scale], **{key: value for key, value in given.items() if value})


def _progress(console: Console) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    return Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console, transient=True)


def _info(case: ComparisonCase) -> CaseInfo:
    return CaseInfo(case.protocol, case.name, case.title, case.kind, case.x, len(case.rows))


def _vocab_size(config: Config) -> int:
    """The vocabulary of a model in a folder; random prompts use it if there is no tokenizer."""
    path = Path(config.model.path) / "config.json"
    if not path.is_file():
        return SMALLEST_VOCABULARY
    content = json.loads(path.read_text(encoding="utf-8"))
    return int(content.get("vocab_size") or SMALLEST_VOCABULARY)


def _about(options: argparse.Namespace, config: Config, num_ranks: int) -> dict[str, Any]:
    from ulysses_infer.version import __version__

    return {
        "model": options.random_model or config.served_model_name,
        "num_ranks": num_ranks,
        "repeats": options.repeats,
        "scale": options.scale,
        "sizes": dataclasses.asdict(sizes_of(options)),
        "threshold_tokens": config.policy.threshold_tokens,
        "date": time.strftime("%Y-%m-%d %H:%M"),
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}",
        "version": __version__,
        "notes": dict(options.note),
        "command": shlex.join(["ulysses-infer", *sys.argv[1:]]),
    }
