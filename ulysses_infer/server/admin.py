"""Administrative commands, run by rank 0 between steps."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ulysses_infer.engine.completion import Completion
from ulysses_infer.engine.engine import Engine
from ulysses_infer.engine.operations import describe
from ulysses_infer.engine.policies import POLICIES, policy_settings
from ulysses_infer.errors import ConfigError, RequestError
from ulysses_infer.server.adapters import AdapterCommands
from ulysses_infer.server.control import Control
from ulysses_infer.server.profiles import ProfileCommands

CONTROLS = (
    "pause",
    "resume",
    "init_weight_transfer_engine",
    "start_weight_update",
    "update_weights",
    "finish_weight_update",
    "update_weight_version",
    "weight_info",
    "sleep",
    "wake_up",
    "is_sleeping",
)


class Commands:
    """Runs the commands of `AdminCall` messages. `drain` starts the shutdown, `report_aborted` informs clients."""

    def __init__(
        self,
        engine: Engine,
        drain: Callable[[], None],
        report_aborted: Callable[[list[Completion]], None],
        control: Control,
    ) -> None:
        self._engine, self._drain, self._report_aborted = engine, drain, report_aborted
        adapters, profiles = AdapterCommands(engine), ProfileCommands(engine)
        self._known: Mapping[str, Callable[..., Any]] = {
            "get_policy": self.get_policy,
            "set_policy": self.set_policy,
            "abort": self.abort,
            "abort_all": self.abort_all,
            "drain": self.drain,
            "reset_prefix_cache": self.reset_prefix_cache,
            "stats": self.stats,
            **{name: getattr(control, name) for name in CONTROLS},
            "load_lora_adapter": adapters.load_lora_adapter,
            "unload_lora_adapter": adapters.unload_lora_adapter,
            "start_profile": profiles.start_profile,
            "stop_profile": profiles.stop_profile,
        }

    def run(self, name: str, arguments: Mapping[str, Any]) -> Any:
        """Run one command; its result is a plain value. Raises `RequestError`."""
        if name not in self._known:
            raise RequestError(f"unknown command {name!r}; there are {', '.join(self._known)}")
        return self._known[name](**arguments)

    def get_policy(self) -> dict[str, Any]:
        """Name and settings of the policy, and the available policies and modes."""
        modes = [list(mode) for mode in self._engine.config.parallel.available_modes]
        return {**self._engine.policies.policy.describe(), "available": list(POLICIES), "modes": modes}

    def set_policy(self, name: str, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Change the policy from the next step on; returns the new one."""
        try:
            self._engine.policies.set_policy(policy_settings(self._engine.config, name, settings))
        except ConfigError as error:
            raise RequestError(str(error)) from error
        return self.get_policy()

    def abort(self, request_id: str) -> dict[str, Any]:
        """End one request, in any state."""
        completion = self._engine.abort(request_id)
        if completion is None:
            raise RequestError(f"no request {request_id!r} is running or waiting; it may have ended")
        self._report_aborted([completion])
        return {"aborted": [request_id]}

    def abort_all(self) -> dict[str, Any]:
        """End every request."""
        completions = self._engine.abort_all()
        self._report_aborted(completions)
        return {"aborted": [completion.request_id for completion in completions]}

    def drain(self) -> dict[str, Any]:
        """Start an orderly shutdown."""
        self._drain()
        return {"draining": True}

    def reset_prefix_cache(self) -> dict[str, Any]:
        """Drop cached prefixes; only possible while the engine is idle."""
        if not self._engine.scheduler.allocator.reset_prefix_cache():
            raise RequestError("requests are running, and they hold cached blocks; try again when the engine is idle")
        return {"reset": True}

    def stats(self) -> dict[str, Any]:
        """Counters per mode, queues, cache use and policy."""
        return describe(self._engine)
