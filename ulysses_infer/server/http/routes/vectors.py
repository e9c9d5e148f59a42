"""Endpoints that compute prompts only: embeddings, pooling, scores and reranking."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from ulysses_infer.server.http.body import read_body
from ulysses_infer.server.http.context import context_of
from ulysses_infer.server.http.openapi import GENERATING, answers, takes
from ulysses_infer.server.http.protocol.vectors import (
    EmbeddingAnswer,
    PoolingAnswer,
    RerankAnswer,
    RerankRequest,
    ScoreAnswer,
    ScoreRequest,
    VectorRequest,
)
from ulysses_infer.server.http.respond import json_response
from ulysses_infer.server.http.vectors.vectors import Computed, rank_documents, score_pairs, vectors

router = APIRouter(tags=["vectors and scores"])


@router.post("/v1/embeddings", responses=answers(EmbeddingAnswer, *GENERATING), **takes(VectorRequest))
async def embeddings(request: Request) -> Response:
    """One vector of length one per input, from the model's hidden states."""
    return _listed("embedding", "embedding", *await _vectors(request, normalizes=True))


@router.post("/pooling", responses=answers(PoolingAnswer, *GENERATING), **takes(VectorRequest))
async def pooling(request: Request) -> Response:
    """One vector per input, as the model computes it."""
    return _listed("pooling", "data", *await _vectors(request, normalizes=False))


@router.post("/v1/score", responses=answers(ScoreAnswer, *GENERATING), **takes(ScoreRequest))
@router.post("/score", include_in_schema=False)
async def score(request: Request) -> Response:
    """How well texts fit a query: as a causal reranker judges (server.score_tokens), else the cosine of vectors."""
    context, body = context_of(request), await read_body(request, ScoreRequest)
    return _listed("score", "score", *await score_pairs(request, context, body))


@router.post("/v1/rerank", responses=answers(RerankAnswer, *GENERATING), **takes(RerankRequest))
@router.post("/v2/rerank", include_in_schema=False)
@router.post("/rerank", include_in_schema=False)
async def rerank(request: Request) -> Response:
    """The documents, the best first, with scores as of /v1/score."""
    context, body = context_of(request), await read_body(request, RerankRequest)
    done, scores = await rank_documents(request, context, body)
    order = sorted(range(len(scores)), key=lambda index: -scores[index])[: body.top_n or None]
    texts = [item if isinstance(item, str) else item.text for item in body.documents]
    shows = body.return_documents is not False
    results = [
        {
            "index": index,
            "document": {"text": texts[index]} if shows else None,
            "relevance_score": scores[index],
        }
        for index in order
    ]
    return json_response({"id": done.id, "model": done.model, "usage": done.usage, "results": results})


async def _vectors(request: Request, normalizes: bool) -> tuple[Computed, list[Any]]:
    context, body = context_of(request), await read_body(request, VectorRequest)
    return await vectors(request, context, body, normalizes)


def _listed(kind: str, name: str, done: Computed, values: Sequence[Any]) -> Response:
    """An answer with one object of a kind per value, which it has under `name`."""
    data = [{"object": kind, "index": index, name: value} for index, value in enumerate(values)]
    return json_response({**done.head, "data": data, "usage": done.usage})
