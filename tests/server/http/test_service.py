"""Keys, administration, models, tokens and the rest."""

from __future__ import annotations

import pytest

from tests.server.http.harness import MODEL, Served, served, wait_for
from tests.tiny import encode
from ulysses_infer import __version__
from ulysses_infer.server.http.texts import Texts

ADMIN = {"Authorization": "Bearer admin-key"}
OPEN = ("/health", "/ready", "/metrics", "/version", "/dashboard")
GUARDED = ("/v1/models", "/dashboard/data", "/openapi.json", "/docs", "/nothing")


def test_models_are_listed_and_found(server: Served) -> None:
    listed = server.openai.models.list().data
    assert [model.id for model in listed] == [MODEL]
    assert server.openai.models.retrieve(MODEL).max_model_len == 128
    assert server.get("/v1/models/other").json()["error"]["code"] == "model_not_found"


def test_a_served_name_may_have_slashes(texts: Texts) -> None:
    with served(texts, served_model_name="org/name") as server:
        assert server.get("/v1/models/org/name").json()["id"] == "org/name"
        assert server.post("/v1/completions", {"model": "org/name", "prompt": "a"}).json()["model"] == "org/name"
        assert server.post("/v1/completions", {"model": MODEL, "prompt": "a"}).status_code == 404


def test_probes_and_version(server: Served) -> None:
    assert server.get("/health").json() == {"status": "ready", "reason": None, "dead_replicas": []}
    assert server.get("/ready").status_code == 200
    assert server.http.head("/health").status_code == 200
    assert server.get("/version").json() == {"version": __version__}


def test_metrics_and_page_are_served(server: Served) -> None:
    assert server.get("/metrics").headers["content-type"].startswith("text/plain")
    assert b"ulysses" in server.get("/metrics").content
    assert server.get("/dashboard").headers["content-type"].startswith("text/html")
    assert server.get("/dashboard/data", params={"seconds": "30"}).json()["status"] == "ready"
    assert server.get("/dashboard/data", params={"seconds": "nan"}).status_code == 400
    assert server.get("/dashboard/data", params={"seconds": "x"}).status_code == 400


def test_the_page_can_be_switched_off(texts: Texts) -> None:
    with served(texts, dashboard=False) as server:
        assert server.get("/dashboard").status_code == 404


def test_text_becomes_tokens_and_back(server: Served) -> None:
    answer = server.post("/tokenize", {"prompt": "abc", "return_token_strs": True}).json()
    assert answer == {"count": 3, "max_model_len": 128, "tokens": encode("abc"), "token_strs": ["a", "b", "c"]}
    answer = server.post("/tokenize", {"messages": [{"role": "user", "content": "x"}]}).json()
    assert (answer["tokens"], answer["token_strs"]) == (encode("[user]x[a]"), None)
    assert server.post("/detokenize", {"tokens": encode("abc")}).json() == {"prompt": "abc"}
    assert server.post("/detokenize", {"tokens": [99]}).status_code == 400
    assert server.post("/tokenize", {}).status_code == 400


def test_the_tokenizers_configuration_is_served_if_that_is_set(server: Served, texts: Texts) -> None:
    info = server.get("/tokenizer_info").json()
    assert info["tokenizer_class"] == type(texts._tokenizer).__name__
    assert info["chat_template"] == texts.chat_template
    assert info["unk_token"] == "<unk>"
    assert not {"name_or_path", "tokenizer_file"} & set(info)
    with served(texts) as closed:
        assert closed.get("/tokenizer_info").status_code == 404


def test_without_a_tokenizer_there_is_no_configuration_of_one() -> None:
    with served(Texts(None), tokenizer_info=True) as server:
        answer = server.get("/tokenizer_info")
    assert (answer.status_code, answer.json()["error"]["message"]) == (
        400,
        "there is no tokenizer; set model.tokenizer",
    )


def test_a_request_id_is_kept_or_made(server: Served) -> None:
    assert server.get("/health", headers={"X-Request-Id": "mine-1"}).headers["x-request-id"] == "mine-1"
    assert len(server.get("/health").headers["x-request-id"]) == 32


# -- keys ----------------------------------------------------------------------------------------------------------


def test_a_key_guards_everything_but_probes_metrics_and_the_page(texts: Texts) -> None:
    with served(texts, api_key="key", admin_api_key="admin-key") as server:
        for path in OPEN:
            assert server.get(path).status_code == 200, path
        for path in GUARDED:
            for header in (
                {},
                {"Authorization": "Bearer wrong"},
                {"Authorization": "key"},
                {"Authorization": "Basic key"},
            ):
                answer = server.get(path, headers=header)
                assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key"), path
                assert answer.headers["www-authenticate"] == "Bearer"
        for key in ("key", "admin-key"):
            header = {"Authorization": f"Bearer {key}"}
            assert server.get("/v1/models", headers=header).status_code == 200
            assert server.get("/dashboard/data", headers=header).status_code == 200
        assert server.post("/v1/completions", {"prompt": "a"}).status_code == 401
        assert server.engine.submits == []
        assert server.get("/admin/policy", headers={"Authorization": "Bearer key"}).status_code == 401


def test_without_an_admin_key_administration_is_off(texts: Texts) -> None:
    with served(texts) as server:
        for header in ({}, ADMIN):
            answer = server.get("/admin/policy", headers=header)
            assert (answer.status_code, answer.json()["error"]["code"]) == (403, "admin_disabled")


# -- administration ------------------------------------------------------------------------------------------------


def test_administration_needs_its_key(server: Served) -> None:
    for header in ({}, {"Authorization": "Bearer wrong"}):
        assert server.get("/admin/policy", headers=header).status_code == 401
    assert server.engine.calls == []


@pytest.mark.parametrize(
    ("method", "path", "body", "command", "arguments"),
    [
        ("GET", "/admin/policy", None, "get_policy", {}),
        (
            "PUT",
            "/admin/policy",
            {"name": "threshold", "settings": {"threshold_tokens": 9}},
            "set_policy",
            {"name": "threshold", "settings": {"threshold_tokens": 9}},
        ),
        ("POST", "/admin/abort", {"all": True}, "abort_all", {}),
        ("POST", "/admin/drain", None, "drain", {}),
        ("POST", "/admin/reset_prefix_cache", None, "reset_prefix_cache", {}),
        ("GET", "/admin/stats", None, "stats", {}),
    ],
)
def test_a_route_is_a_command(
    server: Served, method: str, path: str, body: dict | None, command: str, arguments: dict
) -> None:
    server.engine.replies[command] = {"done": command}
    answer = server.http.request(method, path, json=body, headers=ADMIN)
    assert (answer.status_code, answer.json()) == (200, {"done": command})
    assert [(call.name, call.arguments) for call in server.engine.calls] == [(command, arguments)]


def test_an_answer_is_aborted_by_its_id(server: Served) -> None:
    server.script(num_tokens=1)
    body = {"prompt": ["a", "b"], "request_id": "mine", "stream": True}
    with server.http.stream("POST", "/v1/completions", json=body) as answer:
        lines = answer.iter_lines()
        assert next(lines).startswith("data: ")
        aborted = server.post("/admin/abort", {"request_id": "cmpl-mine"}, headers=ADMIN)
        assert aborted.json() == {"aborted": ["cmpl-mine-0", "cmpl-mine-1"]}
        assert [call.arguments for call in server.engine.calls][-2:] == [
            {"request_id": "cmpl-mine-0"},
            {"request_id": "cmpl-mine-1"},
        ]
    wait_for(lambda: not server.context.running)
    gone = server.post("/admin/abort", {"request_id": "cmpl-mine"}, headers=ADMIN)
    assert (gone.status_code, gone.json()["error"]["code"]) == (404, "unknown_request")


@pytest.mark.parametrize("body", [{}, {"all": False}, {"all": True, "request_id": "a"}, {"every": True}])
def test_an_abort_with_a_wrong_body_is_400(server: Served, body: dict) -> None:
    assert server.post("/admin/abort", body, headers=ADMIN).status_code == 400


# -- pages of other origins ----------------------------------------------------------------------------------------


def test_only_listed_origins_may_read(texts: Texts) -> None:
    with served(texts, cors_origins=["https://a.example"], api_key="key") as server:
        asking = {
            "Origin": "https://a.example",
            "Access-Control-Request-Method": "POST",
            "Access-Control-Request-Headers": "authorization",
        }
        preflight = server.http.options("/v1/completions", headers=asking)
        assert preflight.status_code == 200
        assert preflight.headers["access-control-allow-origin"] == "https://a.example"
        refused = server.get("/v1/models", headers={"Origin": "https://a.example"})
        assert (refused.status_code, refused.headers["access-control-allow-origin"]) == (401, "https://a.example")
        other = server.get("/health", headers={"Origin": "https://b.example"})
        assert "access-control-allow-origin" not in other.headers


def test_without_origins_there_is_no_cors(server: Served) -> None:
    assert "access-control-allow-origin" not in server.get("/health", headers={"Origin": "https://a.example"}).headers


def test_an_adapter_is_requested_as_a_model(server: Served) -> None:
    server.context.adapters["french"] = "/adapters/french"
    try:
        assert [model.id for model in server.openai.models.list().data] == [MODEL, "french"]
        card = server.get("/v1/models/french").json()
        assert (card["root"], card["parent"]) == ("/adapters/french", MODEL)
        answer = server.post("/v1/completions", {"model": "french", "prompt": "a"}).json()
        server.post("/v1/chat/completions", {"model": "french", "messages": [{"role": "user", "content": "a"}]})
        server.post("/v1/completions", {"model": MODEL, "prompt": "a"})
        unnamed = server.post("/v1/completions", {"prompt": "a"})
        server.context.config.server.default_model = "french"
        default = server.post("/v1/completions", {"prompt": "a"}).json()
    finally:
        server.context.adapters.clear()
        server.context.config.server.default_model = None
    assert answer["model"] == default["model"] == "french"
    assert [submit.adapter for submit in server.engine.submits] == ["french", "french", None, "french"]
    assert unnamed.status_code == 400
    assert unnamed.json()["error"]["message"] == (
        "model is missing; this server has 'tiny', 'french' (server.default_model sets a default)"
    )
