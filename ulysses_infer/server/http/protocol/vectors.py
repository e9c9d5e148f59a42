"""Types of /v1/embeddings and /pooling, /v1/score and /v1/rerank."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from ulysses_infer.request_values import MAX_COUNT
from ulysses_infer.server.http.protocol.common import INT32, Body, ResponseBody
from ulysses_infer.server.http.protocol.completions import MAX_PROMPTS, Prompts

Text = Annotated[str, Field(min_length=1)]
Texts = Annotated[list[Text], Field(min_length=1, max_length=MAX_PROMPTS)]


class PromptFields(Body):
    """How prompts are read and scheduled."""

    model: str | None = Field(None, description="The served model or an adapter; null: server.default_model.")
    priority: Annotated[int, Field(ge=-INT32, le=INT32)] | None = Field(None, description="Lower runs earlier.")
    cache_salt: Annotated[str, Field(min_length=1, max_length=1024)] | None = None
    request_id: Annotated[str, Field(pattern="^[A-Za-z0-9._-]{1,128}$")] | None = None
    truncate_prompt_tokens: Annotated[int, Field(ge=-1, le=MAX_COUNT)] | None = Field(
        None, description="Keep only the last tokens of a prompt; -1: as many as the model reads."
    )
    add_special_tokens: bool | None = None
    user: str | None = Field(None, description="Taken, without effect.")


class VectorRequest(PromptFields):
    """One vector per prompt."""

    input: Prompts
    pooling: Literal["last", "mean", "cls"] | None = Field(None, description="null: server.pooling.")
    encoding_format: Literal["float", "base64"] | None = Field(None, description="base64: float32, little-endian.")
    dimensions: Annotated[int, Field(ge=1, le=INT32)] | None = Field(
        None, description="Keep only the first values, for models trained for it; vectors are normalised afterwards."
    )
    normalize: bool | None = Field(None, description="Vectors of length one; the default of /v1/embeddings.")


class TokenUsage(ResponseBody):
    """Token counts."""

    prompt_tokens: int
    total_tokens: int


class Listed(ResponseBody):
    """What all answers with a list of objects have, beside its `data`."""

    id: str
    object: Literal["list"]
    created: int
    model: str
    usage: TokenUsage


class Embedding(ResponseBody):
    """The vector of one prompt."""

    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class EmbeddingAnswer(Listed):
    """The vectors of all prompts."""

    data: list[Embedding]


class PooledPrompt(ResponseBody):
    """The vector of one prompt."""

    object: Literal["pooling"]
    index: int
    data: list[float] | str


class PoolingAnswer(Listed):
    """The vectors of all prompts."""

    data: list[PooledPrompt]


class ScoreRequest(PromptFields):
    """How well texts fit a query: one query for all, or one each."""

    is_strict: ClassVar[bool] = True
    text_1: Text | Texts = Field(description="The query, or one per text of text_2.")
    text_2: Text | Texts = Field(description="The documents.")
    instruction: str | None = Field(None, description="What to look for, for models that read one.")


class Score(ResponseBody):
    """The score of one pair."""

    object: Literal["score"]
    index: int
    score: float


class ScoreAnswer(Listed):
    """The scores of all pairs."""

    data: list[Score]


class Document(Body):
    """A document as an object."""

    text: Text


class RerankRequest(PromptFields):
    """Order documents by how well they fit a query."""

    query: Text
    documents: Annotated[list[Text | Document], Field(min_length=1, max_length=MAX_PROMPTS)]
    top_n: Annotated[int, Field(ge=0, le=INT32)] | None = Field(None, description="0 or null: all.")
    return_documents: bool | None = Field(None, description="The default is true.")
    instruction: str | None = Field(None, description="What to look for, for models that read one.")


class Ranked(ResponseBody):
    """A document's place."""

    index: int = Field(description="In the request.")
    document: dict[str, Any] | None
    relevance_score: float


class RerankAnswer(ResponseBody):
    """The documents, the best first."""

    id: str
    model: str
    usage: TokenUsage
    results: list[Ranked]
