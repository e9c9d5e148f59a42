"""Defaults that depend on the device."""

from __future__ import annotations

from ulysses_infer.config.schema import Config

MAX_NUM_BATCHED_TOKENS = {"cpu": 2048, "cuda": 8192}
"""Measured on a CPU: a step of 8192 tokens takes as long as four of 2048; in steps of 1024 a token takes 4 % longer."""


def choose_for_device(config: Config, device: str) -> None:
    """Set, in place, the values that `config` leaves to the kind of device."""
    scheduler = config.scheduler
    if scheduler.max_num_batched_tokens is None:
        scheduler.max_num_batched_tokens = MAX_NUM_BATCHED_TOKENS[device]
    if scheduler.async_scheduling is None:
        scheduler.async_scheduling = device != "cpu"
