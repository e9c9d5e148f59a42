"""Checkpoints and references of the families, made once per session on first use."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.equivalence.families import tiny_config
from tests.equivalence.tiny_models import Reference, make_checkpoint, make_prompts, make_reference


@pytest.fixture(scope="session")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Reference]:
    """`reference(model_type, **changes)`: a tiny checkpoint of the family with transformers' answers."""
    made: dict[Any, Reference] = {}

    def get(model_type: str, **changes: Any) -> Reference:
        key = (model_type, *sorted(changes.items()))
        if key not in made:
            folder = tmp_path_factory.mktemp(model_type)
            model = make_checkpoint(tiny_config(model_type, **changes), folder)
            made[key] = make_reference(model, folder, make_prompts())
        return made[key]

    return get
