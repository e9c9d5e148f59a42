"""What tests ask the server of a rollout engine for: its metrics."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families

POLL_SECONDS = 0.05


async def samples(url: str, name: str) -> list[Any]:
    """The samples of a metric."""
    async with httpx.AsyncClient(timeout=60) as client:
        text = (await client.get(f"{url}/metrics")).raise_for_status().text
    found = (sample for family in text_string_to_metric_families(text) for sample in family.samples)
    return [sample for sample in found if sample.name == name]


async def wait_for_first_tokens(url: str, count: int) -> None:
    """Wait until this many requests have got their first token since the server started."""
    while sum(each.value for each in await samples(url, "ulysses:time_to_first_token_seconds_count")) < count:
        await asyncio.sleep(POLL_SECONDS)


async def modes(url: str) -> list[str]:
    """The modes of the steps that the server has run."""
    return sorted(each.labels["mode"] for each in await samples(url, "ulysses:steps_total") if each.value)
