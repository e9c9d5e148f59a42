"""/v1/load_lora_adapter and /v1/unload_lora_adapter."""

from tests.server.http.harness import Served
from tests.server.http.test_rollout_routes import ADMIN

NEW = {"lora_name": "fresh", "lora_path": "/adapters/fresh"}


def test_a_loaded_adapter_is_served_as_a_model_until_it_is_unloaded(server: Served) -> None:
    assert server.http.post("/v1/load_lora_adapter", json=NEW, headers=ADMIN).json() == {"status": "loaded"}
    call = server.engine.calls[-1]
    assert (call.name, call.arguments) == ("load_lora_adapter", {**NEW, "load_inplace": False})
    cards = {card["id"]: card for card in server.http.get("/v1/models").json()["data"]}
    assert cards["fresh"]["root"] == "/adapters/fresh"
    assert cards["fresh"]["parent"] in cards
    assert server.http.post("/v1/unload_lora_adapter", json={"lora_name": "fresh"}, headers=ADMIN).status_code == 200
    assert server.engine.calls[-1].name == "unload_lora_adapter"
    assert server.http.get("/v1/models/fresh").status_code == 404


def test_wrong_requests_for_adapters_are_refused_by_name(server: Served) -> None:
    for path, body, status, message in [
        ("/v1/load_lora_adapter", {"lora_name": "x"}, 400, "lora_path is missing"),
        ("/v1/load_lora_adapter", {**NEW, "lora_nam": "x"}, 400, "lora_nam"),
        ("/v1/unload_lora_adapter", {"lora_name": "x"}, 404, "adapter 'x' is not loaded"),
    ]:
        answer = server.http.post(path, json=body, headers=ADMIN)
        assert answer.status_code == status
        assert message in answer.json()["error"]["message"]
    assert not server.engine.calls
