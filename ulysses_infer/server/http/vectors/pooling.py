"""How a checkpoint wants its prompts to become vectors, by sentence-transformers' files."""

from __future__ import annotations

from pathlib import Path

from ulysses_infer.errors import CheckpointError
from ulysses_infer.model.loading.files import read_json_object

FILE = "1_Pooling/config.json"
KINDS = {"pooling_mode_lasttoken": "last", "pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "cls"}


def recommended_pooling(path: str) -> str:
    """The pooling of the checkpoint at `path`, a folder or hub id; "last" if it names none."""
    found = _file(path)
    if found is None:
        return "last"
    try:
        values = read_json_object(found)
    except CheckpointError:
        return "last"
    return next((kind for key, kind in KINDS.items() if values.get(key)), "last")


def _file(path: str) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    local = Path(path).expanduser() / FILE
    if local.is_file():
        return local
    cached = try_to_load_from_cache(path, FILE) if path.count("/") == 1 and not Path(path).is_dir() else None
    return Path(cached) if isinstance(cached, str) else None
