"""Other projects' clients against our server: how their results are read, and those of the test extra themselves."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import pytest

from benchmarks.compare_peers.environments import UnavailableError
from tests.server.job import ROOT, Job
from tools import check_clients
from tools.check_clients import CLIENTS, DECLINES, SETTINGS, Client, Result, interpreter_of, results_of, table
from tools.clients.checking import Results, Server, equal, json_lines, run_all

SERVER = Server("http://127.0.0.1:1", "demo", "models/demo")


def passes(server: Server) -> None:
    equal(server.model, "demo")


def does_not_pass(server: Server) -> None:
    equal(server.url, "another")


def test_each_check_is_written_with_what_was_wrong() -> None:
    file = io.StringIO()
    run_all([passes, does_not_pass])(SERVER, Results(file))
    first, second = json_lines(file.getvalue() + "no json\n")
    assert first == {"check": "passes", "error": None}
    assert second["check"] == "does not pass"
    assert second["error"].startswith("AssertionError: ")
    assert "'http://127.0.0.1:1' instead of 'another'" in second["error"]


def test_what_is_not_offered_is_declined_and_all_else_fails() -> None:
    declined = next(iter(DECLINES))
    results = [
        Result("openai", "chat", None),
        Result("openai", "chat", "ValueError: no"),
        Result("llm-comply", declined, "status 400"),
        Result("llm-comply", "open-responses: basic-response", None),
    ]
    assert [result.outcome for result in results] == ["passed", "FAILED", "declined", "passed"]
    assert results[1].line == "FAILED    openai: chat: ValueError: no"
    assert results[2].line.endswith(DECLINES[declined])
    assert [line.split() for line in table(results).splitlines()] == [
        ["client", "passed", "failed", "declined"],
        ["openai", "1", "1", "0"],
        ["llm-comply", "1", "0", "1"],
    ]


def test_a_client_that_is_not_installed_is_left_out_with_the_remedy(tmp_path: Path) -> None:
    assert interpreter_of(CLIENTS[0], tmp_path, installs=False) == Path(sys.executable)
    with pytest.raises(UnavailableError, match="it is not installed; add --install"):
        interpreter_of(Client("no-such-client", "1", "none"), tmp_path, installs=False)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").touch()
    assert interpreter_of(Client("no-such-client", "1", "none"), tmp_path, installs=False).parent == tmp_path / "bin"


def test_a_program_that_breaks_off_fails_with_its_last_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(check_clients, "served_name", lambda url: "demo")
    client = Client("openai", "1", "no_such_program")
    (result,) = results_of(client, Path(sys.executable), SERVER.url, str(tmp_path))
    assert (result.check, result.outcome) == ("ends well", "FAILED")
    assert "No module named tools.clients.no_such_program" in (result.error or "")


def test_every_client_has_a_program_and_a_version() -> None:
    for client in CLIENTS:
        assert (ROOT / "tools" / "clients" / f"{client.program}.py").is_file()
        assert f"=={client.version}" in json.dumps(client.recipe.installs)


@pytest.mark.thorough
@pytest.mark.distributed
@pytest.mark.parametrize("package", ["openai", "anthropic"])
def test_the_official_clients_pass_on_two_ranks(package: str) -> None:
    model = str(ROOT / "models" / "demo")
    changes = dict(setting.split("=", 1) for setting in SETTINGS if not setting.startswith("parallel"))
    limits = {"cache.block_size": 16, "cache.num_blocks": 512, "server.served_model_name": "demo"}
    with Job(model, **changes, **limits) as job:
        client = next(client for client in CLIENTS if client.package == package)
        found = list(results_of(client, Path(sys.executable), job.url, model))
    assert len(found) > 5
    assert [result.line for result in found if result.error] == []
