"""The Grafana dashboard queries metrics that exist."""

from __future__ import annotations

import json
import re
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

from tests.server.observe.scripted_server import ScriptedServer

DASHBOARD = json.loads((Path(__file__).parents[3] / "configs" / "grafana" / "ulysses-infer.json").read_text())


def expressions() -> list[str]:
    return [target["expr"] for panel in DASHBOARD["panels"] for target in panel.get("targets", ())]


def offered() -> dict[str, set[str]]:
    """The labels of every series of a server that was busy, by its name."""
    observatory = ScriptedServer(past=30.0, live=False, drafts=4).observatory
    observatory._metrics.on_http("GET", "/health", 200, 0.001)
    series: dict[str, set[str]] = {}
    for family in text_string_to_metric_families(observatory.metrics_text().decode()):
        for sample in family.samples:
            series.setdefault(sample.name, set()).update(sample.labels)
    return series


def test_every_metric_it_queries_is_offered_with_the_labels_it_uses() -> None:
    series = offered()
    selector = re.compile(r"(ulysses:\w+)(?:\{([^}]*)\})?")
    queried = set()
    for expression in expressions():
        for name, labels in selector.findall(expression):
            queried.add(name)
            assert name in series, expression
            assert set(re.findall(r"(\w+)=", labels)) <= series[name], expression
        for label, name in re.findall(r"by \(([^)]*)\)[ \w(]*\((ulysses:\w+)", expression):
            assert set(label.split(", ")) & series[name], expression
    assert len(queried) > 25


def test_every_metric_is_on_it() -> None:
    text = " ".join(expressions())
    bare = {re.sub(r"_(bucket|count|sum|created)$", "", name) for name in offered()}
    bare |= {name.removesuffix("_total") for name in bare if name.endswith("_created")}
    assert {name for name in bare if name not in text and f"{name}_total" not in text} == set()


def test_the_data_source_is_chosen_where_it_is_imported() -> None:
    names = {variable["name"]: variable["type"] for variable in DASHBOARD["templating"]["list"]}
    assert names == {"datasource": "datasource", "model_name": "query"}
    sources = {panel["datasource"]["uid"] for panel in DASHBOARD["panels"] if "datasource" in panel}
    assert sources == {"${datasource}"}
    identities = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(set(identities)) == len(identities)
