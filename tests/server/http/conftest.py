from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.server.http.harness import Served, served, tiny_texts
from ulysses_infer.server.http.texts import Texts


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Texts:
    return tiny_texts(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="session")
def shared_server(texts: Texts) -> Iterator[Served]:
    with served(texts, admin_api_key="admin-key", tokenizer_info=True) as server:
        yield server


@pytest.fixture
def server(shared_server: Served) -> Served:
    """A server whose engine answers "hello world" to everything."""
    shared_server.reset()
    return shared_server
