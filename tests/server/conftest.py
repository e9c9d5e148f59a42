"""What tests of the running server share."""

import pytest

from tests.tiny import tiny_llama


@pytest.fixture(scope="session")
def long_folder(tmp_path_factory):
    """The tiny Llama for texts long enough to be interrupted."""
    made = tmp_path_factory.mktemp("long-llama")
    tiny_llama(made, max_position_embeddings=8192)
    return str(made)
