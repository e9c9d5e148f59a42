"""A checkpoint whose output is known: token n is followed by n + 1, at the cost of any model of its shape.

The output of random weights repeats nothing. Here attention and MLP are computed in full but multiplied by zeros at
their ends, so the hidden state stays the last token's embedding, and the vocabulary head is the table of embeddings,
moved by one. So the prompt decides what the output repeats: that of a real edit of code repeats what the edit keeps,
and differs where it changes something.
"""

from __future__ import annotations

import difflib
import fcntl
import random
import re
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from ulysses_infer.bench.random_model import COMPLETE, random_model
from ulysses_infer.bench.serve.repetition import CodeEdit
from ulysses_infer.cache_folders import cache_folder

UNIT = re.compile(r"\w{1,6}|\s+|[^\w\s]")  # about a token
FIRST = 16  # lower ids are special in some models


def counting_model(shape: str) -> Path:
    """The folder of the model with a shape of `SHAPES`; made in the cache if necessary, by one process at a time."""
    source, target = random_model(shape), cache_folder("models") / f"{shape}-counting"
    with open(target.with_name(target.name + ".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (target / COMPLETE).is_file():
            _make(source, target)
    return target


def _make(source: Path, target: Path) -> None:
    unfinished = target.with_name(target.name + ".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    shutil.copytree(source, unfinished)
    weights = load_file(source / COMPLETE)
    for name, weight in weights.items():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            weight.zero_()
    table = weights["model.embed_tokens.weight"]
    table.normal_(generator=torch.Generator().manual_seed(0))
    weights["lm_head.weight"] = table.roll(1, 0).contiguous()  # row n + 1 is the embedding of n
    save_file(weights, unfinished / COMPLETE, metadata={"format": "pt"})
    shutil.rmtree(target, ignore_errors=True)
    unfinished.rename(target)


def edit_prompt(edit: CodeEdit, vocab_size: int, output_len: int, seed: int) -> list[int]:
    """Token ids of a prompt for `counting_model` whose output of `output_len` tokens repeats it as the edited code
    repeats the code before the edit.

    Token n of the edited code is `FIRST` + n. The code before it has the same token where the edit keeps it, and one
    that the output never has where the edit changes it. The prompt ends with the token before the edited code. An edit
    that is too short is followed by itself, with other tokens.
    """
    before, after = UNIT.findall(edit.before), UNIT.findall(edit.after)
    draw = random.Random(seed)
    copies = -(-output_len // len(after))
    text: list[int] = []
    for copy in range(copies):
        start = FIRST + copy * len(after)
        ids = [draw.randrange(FIRST + copies * len(after) + 1, vocab_size) for _ in before]
        for old, new, size in difflib.SequenceMatcher(None, before, after, autojunk=False).get_matching_blocks():
            ids[old : old + size] = range(start + new, start + new + size)
        text += ids
    return [*text, FIRST - 1]


def random_prompt(vocab_size: int, length: int, output_len: int, seed: int) -> list[int]:
    """Token ids of a prompt that has no two neighbours of the output in common with it: nothing can be predicted."""
    draw = random.Random(seed)
    last = draw.randrange(FIRST, vocab_size - output_len - 1)
    others = [token for token in range(FIRST, vocab_size) if not last <= token <= last + output_len + 1]
    return [*draw.choices(others, k=length - 1), last]
