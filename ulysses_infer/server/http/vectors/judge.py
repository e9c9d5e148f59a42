"""Scores of a causal reranker: how likely it answers with one token rather than with another."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ulysses_infer.config import Config
from ulysses_infer.errors import ConfigError
from ulysses_infer.server.http.texts import Texts, read_template

INSTRUCTION = "Given a web search query, retrieve relevant passages that answer the query"
# The format that the Qwen3-Reranker models were trained with, from their model card.
QWEN3_TEMPLATE = (
    "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and the Instruct "
    'provided. Note that the answer can only be "yes" or "no".<|im_end|>\n<|im_start|>user\n'
    "<Instruct>: {{ instruction }}\n<Query>: {{ query }}\n<Document>: {{ document }}<|im_end|>\n"
    "<|im_start|>assistant\n<think>\n\n</think>\n\n"
)


class Judge:
    """Turns a pair of texts into a prompt, and the model's answer into a score from 0 to 1."""

    def __init__(self, token_ids: tuple[int, int], template: str) -> None:
        """token_ids: of the answers for texts that do not fit, and for those that do. template: Jinja, with
        `query`, `document` and `instruction`."""
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        self.token_ids = token_ids
        self._template = ImmutableSandboxedEnvironment(keep_trailing_newline=True).from_string(template)

    def prompt(self, query: str, document: str, instruction: str | None) -> str:
        """The text that the model answers."""
        return self._template.render(query=query, document=document, instruction=instruction or INSTRUCTION)

    def score(self, logprobs: Sequence[tuple[int, float, int]]) -> float:
        """The probability of the second answer, if only the two are possible. logprobs: (token id, value, rank)."""
        values = {token: value for token, value, _ in logprobs}
        no, yes = (values[token] for token in self.token_ids)
        return 1 / (1 + math.exp(min(no - yes, 700.0)))


def make_judge(config: Config, texts: Texts) -> Judge | None:
    """The judge that the recipe describes, or None. Raises `ConfigError`."""
    answers = config.server.score_tokens
    if not answers:
        return None
    if len(answers) != 2:
        raise ConfigError(f"server.score_tokens has {len(answers)} entries; give two, as [no, yes]")
    path = config.server.score_template
    template = QWEN3_TEMPLATE if path is None else read_template(path)
    no, yes = (_token_id(texts, answer) for answer in answers)
    return Judge((no, yes), template)


def _token_id(texts: Texts, answer: str) -> int:
    found = texts.encode_inline(answer)
    if len(found) != 1:
        raise ConfigError(f"server.score_tokens has {answer!r}, which is {len(found)} tokens; each must be one")
    return found[0]
