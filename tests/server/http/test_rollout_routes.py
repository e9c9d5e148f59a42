"""Routes for reinforcement learning: what they ask of the engine, and who may call them."""

from __future__ import annotations

from typing import Any

import pytest

from tests.server.http.harness import Served
from ulysses_infer.server.http.guards import ADMIN_PATHS

ADMIN = {"Authorization": "Bearer admin-key"}


@pytest.mark.parametrize(
    ("path", "body", "command", "arguments"),
    [
        ("/pause?mode=keep&clear_cache=false", None, "pause", {"mode": "keep", "clear_cache": False}),
        ("/pause", None, "pause", {"mode": "abort", "clear_cache": True}),
        ("/resume", None, "resume", {}),
        ("/sleep?level=2", None, "sleep", {"level": 2}),
        ("/wake_up", None, "wake_up", {}),
        ("/start_profile", None, "start_profile", {}),
        ("/stop_profile", None, "stop_profile", {}),
        ("/start_weight_update", None, "start_weight_update", {}),
        ("/finish_weight_update", None, "finish_weight_update", {"weight_version": None}),
        ("/finish_weight_update", {"weight_version": "7"}, "finish_weight_update", {"weight_version": "7"}),
        ("/update_weight_version", {"new_version": "8"}, "update_weight_version", {"new_version": "8"}),
        ("/update_weights", {"update_info": {"path": "/x"}}, "update_weights", {"path": "/x"}),
    ],
)
def test_each_route_runs_its_command(
    server: Served, path: str, body: Any, command: str, arguments: dict[str, Any]
) -> None:
    server.engine.replies["pause"] = {"is_paused": True}
    answer = server.http.post(path, json=body, headers=ADMIN)
    assert answer.status_code == 200, answer.text
    call = server.engine.calls[-1]
    assert (call.name, call.arguments) == (command, arguments)


def test_the_routes_need_the_key_of_the_administrator(server: Served) -> None:
    for path in ADMIN_PATHS:
        assert server.http.post(path).status_code == 401
    assert not server.engine.calls


@pytest.mark.parametrize(
    ("path", "body", "message"),
    [
        ("/pause?clear_cache=maybe", None, "clear_cache is 'maybe'; use true or false"),
        ("/sleep?level=3", None, "level is '3'; use 1 (cache) or 2 (cache and weights)"),
        ("/update_weights", {}, "update_info is missing"),
        ("/init_weight_transfer_engine", {"init_info": {"master_address": "a"}}, "init_info.master_port is missing"),
    ],
)
def test_wrong_requests_are_refused_by_name(server: Served, path: str, body: Any, message: str) -> None:
    answer = server.http.post(path, json=body, headers=ADMIN)
    assert answer.status_code == 400
    assert message in answer.json()["error"]["message"]
