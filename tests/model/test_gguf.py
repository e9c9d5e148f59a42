"""A GGUF file as `model.path`: transformers' weights of it, its tokenizer and its chat template."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.caches import empty_cache
from tests.model.gguf_files import tiny_qwen2, write_gguf
from ulysses_infer import SamplingParams, init_inference
from ulysses_infer.errors import CheckpointError
from ulysses_infer.model.loading.gguf import converted, find_gguf

GREEDY = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
pytest.importorskip("gguf")


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", empty_cache(tmp_path / "cache"))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "models" / "tiny.gguf"
    path.parent.mkdir()
    write_gguf(tiny_qwen2(), path)
    return path


@pytest.mark.parametrize("as_folder", [False, True])
def test_a_file_is_served_with_its_tokenizer(file: Path, as_folder: bool) -> None:
    model = tiny_qwen2(is_tied=as_folder)
    write_gguf(model, file)
    path = file.parent if as_folder else file
    with init_inference(str(path), **{"runtime.device": "cpu", "model.dtype": "float32"}) as engine:
        (output,) = engine.generate(["(say:hi)"], GREEDY)
        assert engine.config.served_model_name == ("models" if as_folder else "tiny")
        template = engine.tokenizer.chat_template
    ids = torch.tensor([output.prompt_token_ids])
    expected = model.generate(ids, max_new_tokens=6, min_new_tokens=6, do_sample=False, pad_token_id=0)
    assert output.outputs[0].token_ids == expected[0, ids.shape[1] :].tolist()
    assert len(output.prompt_token_ids) == len("(say:hi)") - 1, "hi is one token by the merges of the file"
    assert "im_start" in template


def test_it_is_converted_once_per_dtype_and_again_if_it_changes(file: Path) -> None:
    first = converted(file, "auto")
    assert converted(file, "bfloat16") == first
    assert converted(file, "float32") != first
    written = (first / "config.json").stat().st_mtime_ns
    assert (converted(file, "auto") / "config.json").stat().st_mtime_ns == written
    write_gguf(tiny_qwen2(), file)
    assert converted(file, "auto") != first
    assert sorted(path.suffix for path in first.parent.iterdir() if path.name.startswith("tmp")) == []


def test_a_folder_with_several_files_asks_for_one(file: Path) -> None:
    file.with_name("other.gguf").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"has 2 GGUF files \(other.gguf, tiny.gguf\); give one of them"):
        find_gguf(file.parent)


def test_a_checkpoint_beside_a_file_is_preferred(file: Path) -> None:
    file.with_name("config.json").write_text("{}")
    assert find_gguf(file.parent) is None


@pytest.mark.parametrize("content", [b"", b"GGUF" + bytes(100)])
def test_a_file_that_cannot_be_read_is_one_line(tmp_path: Path, content: bytes) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(content)
    with pytest.raises(
        CheckpointError, match=r"broken.gguf cannot be read: .*; give a safetensors checkpoint"
    ) as error:
        converted(broken, "auto")
    assert "\n" not in str(error.value)


def test_an_architecture_that_is_not_known_is_named(tmp_path: Path) -> None:
    write_gguf(tiny_qwen2(), tmp_path / "odd.gguf", "no_such_model")
    with pytest.raises(CheckpointError, match="no_such_model"):
        converted(tmp_path / "odd.gguf", "auto")


def test_without_the_package_the_extra_is_named(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec: Any = __import__("importlib.util").util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "gguf" else find_spec(name))
    with pytest.raises(Exception, match=r"a GGUF file needs gguf; install: pip install \"ulysses_infer\[gguf\]\""):
        converted(file, "auto")
