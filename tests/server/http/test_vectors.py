"""Endpoints that compute prompts only: embeddings, pooling, scores and reranking."""

from __future__ import annotations

import base64
import json
import math
import struct
from pathlib import Path
from typing import Any

import pytest

from tests.server.http.harness import Served, connect, served
from tests.tiny import encode
from ulysses_infer.errors import ConfigError
from ulysses_infer.server.http.texts import Texts
from ulysses_infer.server.http.vectors.pooling import recommended_pooling


def raw(text: str) -> list[float]:
    """The fake engine's vector of a text."""
    ids = encode(text)
    return [float(len(ids)), float(ids[0]), float(ids[-1]), 0.0]


def unit(vector: list[float]) -> list[float]:
    return [value / math.hypot(*vector) for value in vector]


def cosine(first: str, second: str) -> float:
    return sum(a * b for a, b in zip(unit(raw(first)), unit(raw(second)), strict=True))


def test_openais_client_gets_embeddings(server: Served) -> None:
    found = server.openai.embeddings.create(model="tiny", input=["hello", "a text"])  # it asks for base64
    assert [item.index for item in found.data] == [0, 1]
    for item, text in zip(found.data, ["hello", "a text"], strict=True):
        assert item.embedding == pytest.approx(unit(raw(text)), abs=1e-6)
    assert found.usage.prompt_tokens == len(encode("hello")) + len(encode("a text"))
    assert [submit.params["pooling"] for submit in server.engine.submits] == ["last", "last"]


def test_vectors_are_shortened_normalised_and_encoded_as_asked(server: Served) -> None:
    body = {"input": encode("hello"), "dimensions": 2, "encoding_format": "float"}
    (item,) = server.post("/v1/embeddings", body).json()["data"]
    assert item["embedding"] == pytest.approx(unit(raw("hello")[:2]))
    (item,) = server.post("/pooling", {"input": "hello", "pooling": "mean", "encoding_format": "base64"}).json()["data"]
    assert list(struct.unpack("<4f", base64.b64decode(item["data"]))) == raw("hello")
    assert server.engine.submits[-1].params["pooling"] == "mean"
    (item,) = server.post("/pooling", {"input": "hello", "truncate_prompt_tokens": 3}).json()["data"]
    assert item["data"] == raw("llo")


def test_scores_without_a_judge_are_cosines_and_documents_come_best_first(server: Served) -> None:
    answer = server.post("/v1/score", {"text_1": "hello", "text_2": ["hello", "abc"]}).json()
    assert [item["score"] for item in answer["data"]] == pytest.approx([1.0, cosine("hello", "abc")])
    pairs = server.post("/score", {"text_1": ["a", "bc"], "text_2": ["bc", "a"]}).json()["data"]
    assert [item["score"] for item in pairs] == pytest.approx([cosine("a", "bc")] * 2)
    documents = ["zz top zz", {"text": "hello"}, "hella"]
    answer = server.post("/v1/rerank", {"query": "hello", "documents": documents, "top_n": 2}).json()
    order = sorted(range(3), key=lambda index: -cosine("hello", ["zz top zz", "hello", "hella"][index]))
    assert [item["index"] for item in answer["results"]] == order[:2]
    assert order[0] == 1
    assert answer["results"][0]["document"] == {"text": "hello"}
    bare = server.post("/rerank", {"query": "a", "documents": ["a", "b"], "return_documents": False}).json()
    assert [item["document"] for item in bare["results"]] == [None, None]


def test_a_judge_scores_by_the_chance_of_its_answer(texts: Texts, tmp_path: Path) -> None:
    template = tmp_path / "prompt.jinja"
    template.write_text("{{ instruction }}: {{ query }} or {{ document }}?")
    with served(texts, score_tokens=["n", "y"], score_template=str(template)) as server:
        body = {"query": "q", "documents": ["d", "longer"], "instruction": "same"}
        answer = server.post("/v1/rerank", body).json()
        assert [item["index"] for item in answer["results"]] == [1, 0]
        prompt = encode("same: q or longer?")
        assert server.engine.submits[-1].token_ids == prompt
        assert answer["results"][0]["relevance_score"] == pytest.approx(1 / (1 + math.exp(-len(prompt) / 10)))


@pytest.mark.parametrize(
    ("path", "body", "message"),
    [
        ("/v1/embeddings", {"input": []}, "input should be a text"),
        ("/v1/embeddings", {"input": "a", "dimensions": 9}, "dimensions is 9; the vectors have 4"),
        ("/v1/embeddings", {"input": "a", "pooling": "max"}, "pooling"),
        ("/v1/embeddings", {"input": [999999]}, "token id 999999 is outside the vocabulary"),
        ("/v1/embeddings", {"input": "a" * 200}, "the prompt has 200 tokens"),
        ("/v1/score", {"text_1": ["a", "b"], "text_2": ["c"]}, "text_1 has 2 texts and text_2 1"),
        ("/v1/rerank", {"query": "a", "documents": []}, "documents"),
    ],
)
def test_wrong_requests_are_refused_in_one_line(server: Served, path: str, body: Any, message: str) -> None:
    answer = server.post(path, body)
    assert answer.status_code == 400
    assert message in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("answers", "message"),
    [(["yes"], "has 1 entries; give two"), (["no", "y"], "has 'no', which is 2 tokens; each must be one")],
)
def test_wrong_answers_of_a_judge_are_refused_at_start(texts: Texts, answers: list[str], message: str) -> None:
    import asyncio

    with pytest.raises(ConfigError, match=message):
        asyncio.run(connect(texts, score_tokens=answers))


def test_the_pooling_of_a_checkpoint_is_that_of_sentence_transformers(tmp_path: Path) -> None:
    assert recommended_pooling(str(tmp_path)) == "last"
    (tmp_path / "1_Pooling").mkdir()
    config = {"pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True}
    (tmp_path / "1_Pooling/config.json").write_text(json.dumps(config))
    assert recommended_pooling(str(tmp_path)) == "mean"
