"""The `generate` command: streams completions of the prompts of a recipe or the command line."""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

from rich.console import Console

from ulysses_infer.config import Config, GenerateConfig, resolved_yaml
from ulysses_infer.console.banner import loaded, print_config
from ulysses_infer.console.lines import LineDisplay
from ulysses_infer.console.panels import LiveDisplay
from ulysses_infer.console.run_view import RunView
from ulysses_infer.console.screen import make_console
from ulysses_infer.console.summary import print_completions, print_summary
from ulysses_infer.errors import ConfigError
from ulysses_infer.outputs import RequestOutput
from ulysses_infer.sampling_params import SamplingParams


def run(options: argparse.Namespace, config: Config, rank: int) -> None:
    """Generate on all ranks, print on rank 0. Collective. Raises `UlyssesError`s of one line."""
    settings, console = config.generate, make_console(rank)
    check_output(settings.output)
    prompts = [prompt_of(item) for item in settings.prompts]
    params = [params_of(item, settings.sampling) for item in settings.prompts]
    print_config(console, "generate", config)
    with loaded(config, console) as engine:
        arrivals = list(settings.schedule or [0] * len(params))
        view = RunView([title_of(item) for item in settings.prompts], params, arrivals)
        display = _display(console, view, settings)

        def on_step(touched: dict[int, RequestOutput]) -> None:
            view.take(touched, engine.recent_steps)
            display.on_step()

        with display:
            outputs = engine.generate(
                prompts, params, on_step=on_step, arrival_steps=view.arrivals, adapter=settings.adapter
            )
        stats = engine.stats()
    if rank == 0:
        if console.is_terminal or not settings.stream:
            print_completions(console, view, outputs)
        print_summary(console, view, outputs, stats)
        write_results(config, view, outputs, stats, console)


def _display(console: Console, view: RunView, settings: GenerateConfig) -> LiveDisplay | LineDisplay:
    kind = LiveDisplay if console.is_terminal else LineDisplay
    return kind(console, view, settings.stream)


def prompt_of(item: Any) -> Any:
    """An entry of `generate.prompts` as the engine takes it: text or chat messages."""
    if isinstance(item, str):
        return item
    return item["prompt"] if "prompt" in item else [dict(message) for message in item["messages"]]


def title_of(item: Any) -> str:
    """An entry of `generate.prompts` for display: its text, or the last message with a mark."""
    prompt = prompt_of(item)
    return prompt if isinstance(prompt, str) else f"{prompt[-1]['content']}\n\n"


def params_of(item: Any, shared: dict[str, Any]) -> SamplingParams:
    """The sampling parameters of one entry: its own, over the common ones."""
    own = {} if isinstance(item, str) else item.get("sampling", {})
    return SamplingParams.from_mapping({**shared, **own})


def check_output(output: str | None) -> None:
    """Raise `ConfigError` before anything runs if the results could not be written afterwards."""
    if output is not None and not Path(output).parent.is_dir():
        raise ConfigError(f"generate.output = {output!r}: folder '{Path(output).parent}' does not exist; create it")


def write_results(
    config: Config, view: RunView, outputs: list[RequestOutput], stats: dict[str, Any], console: Console
) -> None:
    """Write `generate.output`: one JSON line per request; next to it the resolved recipe and the engine's counters."""
    if config.generate.output is None:
        return
    path = Path(config.generate.output)
    path.write_text("".join(json.dumps(_record(i, view, o)) + "\n" for i, o in enumerate(outputs)), encoding="utf-8")
    path.with_suffix(".config.yaml").write_text(resolved_yaml(config), encoding="utf-8")
    path.with_suffix(".stats.json").write_text(json.dumps(stats, indent=2) + "\n", encoding="utf-8")
    others = f"{path.with_suffix('.config.yaml').name}, {path.with_suffix('.stats.json').name}"
    console.print(f"  written: {path} (and {others})", style="dim", markup=False)


def _record(index: int, view: RunView, output: RequestOutput) -> dict[str, Any]:
    metrics = output.metrics
    assert metrics is not None
    return {
        "index": index,
        "prompt": output.prompt,
        "num_prompt_tokens": len(output.prompt_token_ids),
        "num_cached_tokens": output.num_cached_tokens,
        "arrival_step": view.arrivals[index],
        "first_token_step": view.first_steps.get(index),
        "outputs": [dataclasses.asdict(sequence) for sequence in output.outputs],
        "ttft_ms": None if metrics.ttft is None else metrics.ttft * 1e3,
        "tpot_ms": None if metrics.tpot is None else metrics.tpot * 1e3,
        "e2el_ms": None if metrics.e2e_latency is None else metrics.e2e_latency * 1e3,
    }
