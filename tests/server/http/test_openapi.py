"""/openapi.json matches the server's behaviour: schemathesis sends a few hundred generated requests."""

from __future__ import annotations

import contextlib

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from tests.server.http.harness import Served

CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
]
ADMIN = {"Authorization": "Bearer admin-key"}


OPERATIONS = [
    "POST /v1/completions",
    "POST /v1/chat/completions",
    "POST /v1/responses",
    "GET /v1/responses/{response_id}",
    "DELETE /v1/responses/{response_id}",
    "POST /v1/responses/{response_id}/cancel",
    "GET /v1/responses/{response_id}/input_items",
    "POST /v1/load_lora_adapter",
    "POST /v1/unload_lora_adapter",
    "POST /v1/embeddings",
    "POST /pooling",
    "POST /v1/score",
    "POST /v1/rerank",
    "POST /v1/messages",
    "POST /v1/messages/count_tokens",
    "GET /v1/models",
    "GET /v1/models/{model}",
    "POST /inference/v1/generate",
    "POST /tokenize",
    "POST /detokenize",
    "GET /tokenizer_info",
    "GET /health",
    "GET /ready",
    "GET /version",
    "GET /ping",
    "POST /ping",
    "GET /load",
    "GET /server_info",
    "GET /metrics",
    "GET /dashboard",
    "GET /dashboard/data",
    "GET /admin/policy",
    "PUT /admin/policy",
    "POST /admin/abort",
    "POST /admin/drain",
    "POST /admin/reset_prefix_cache",
    "GET /admin/stats",
    "POST /pause",
    "POST /resume",
    "GET /is_paused",
    "POST /abort_requests",
    "POST /init_weight_transfer_engine",
    "POST /start_weight_update",
    "POST /update_weights",
    "POST /finish_weight_update",
    "POST /update_weight_version",
    "GET /weight_info",
    "GET /get_world_size",
    "POST /sleep",
    "POST /wake_up",
    "GET /is_sleeping",
    "POST /reset_prefix_cache",
    "POST /start_profile",
    "POST /stop_profile",
]
REPLIES = {
    "abort_all": {"aborted": []},
    "abort": {"aborted": []},
    "pause": {"is_paused": True},
    "weight_info": {"weight_version": None},
    "is_sleeping": {"is_sleeping": False},
}


@pytest.fixture(scope="module")
def document(shared_server: Served) -> schemathesis.BaseSchema:
    return schemathesis.openapi.from_url(shared_server.url + "/openapi.json")


@pytest.mark.parametrize("mode", list(GenerationMode))
@pytest.mark.parametrize("label", OPERATIONS)
def test_answers_are_as_described(
    server: Served, document: schemathesis.BaseSchema, label: str, mode: GenerationMode
) -> None:
    server.engine.replies.update(REPLIES)
    method, path = label.split()
    operation = document[path][method]

    @given(case=operation.as_strategy(generation_mode=mode))
    @settings(
        max_examples=10,
        derandomize=True,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    def ask(case: schemathesis.Case) -> None:
        case.call_and_validate(checks=CHECKS, headers=ADMIN)

    with contextlib.suppress(Unsatisfiable):  # an operation without input has no wrong input
        ask()


def test_no_operation_is_left_out(document: schemathesis.BaseSchema) -> None:
    assert sorted(found.ok().label for found in document.get_all_operations()) == sorted(OPERATIONS)


def test_no_route_claims_to_answer_422(server: Served) -> None:
    paths = server.get("/openapi.json").json()["paths"]
    answers = {status for path in paths.values() for operation in path.values() for status in operation["responses"]}
    assert "422" not in answers
    assert {"200", "400", "401", "404", "413", "415", "503"} <= answers
    assert {"/v1/completions", "/v1/chat/completions", "/v1/models/{model}", "/admin/policy"} <= set(paths)
