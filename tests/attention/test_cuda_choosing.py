"""The attention backend chosen on a GPU: refusals have a reason, and a named backend is used or refused in one line."""

import dataclasses
import itertools
import logging
import sys
import types

import pytest
import torch
from transformers import AutoConfig

from benchmarks.recipe_models import MODELS, recipe_path, write_config
from ulysses_infer.attention import selection as choosing
from ulysses_infer.attention.backend import AttentionOptions
from ulysses_infer.attention.selection import CAPABILITIES, AttentionNeeds, choose, make_backend, make_gpu_backend
from ulysses_infer.config import load_config
from ulysses_infer.errors import ConfigError

EVERYTHING = set(CAPABILITIES)
HOPPER = AttentionNeeds((9, 0), torch.bfloat16, torch.bfloat16, 128, 128, block_size=256)


def chosen(installed=EVERYTHING, name="auto", **changes):
    return choose(name, dataclasses.replace(HOPPER, **changes), installed)


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({}, "flash_attn"),
        ({"block_size": 16}, "flashinfer"),
        ({"alibi": True}, "flash_attn"),
        ({"alibi": True, "block_size": 16}, "triton"),
        ({"chunks": True}, "triton"),
        ({"dtype": torch.float32, "cache_dtype": torch.float32}, "triton"),
        ({"key_width": 192, "value_width": 192}, "flash_attn"),
        ({"key_width": 192, "value_width": 128}, "triton"),
        ({"block_size": 16, "key_width": 96, "value_width": 96}, "triton"),
        ({"block_size": 8, "key_width": 96, "value_width": 96}, "triton"),
        ({"cache_dtype": torch.float8_e4m3fn}, "triton"),
        ({"latents": True, "key_width": 288, "value_width": 256}, "triton"),
        ({"capability": (7, 5)}, "torch"),
        ({"key_width": 512, "value_width": 512}, "triton"),
        ({"key_width": 1024, "value_width": 1024}, "torch"),
        ({"block_size": 16, "other_widths": frozenset({(64, 64)})}, "flashinfer"),
        ({"block_size": 16, "other_widths": frozenset({(96, 96)})}, "triton"),
        ({"other_widths": frozenset({(512, 512), (64, 64)})}, "triton"),
        ({"cache_dtype": torch.float8_e5m2, "chunks": True, "capability": (8, 0)}, "triton"),
    ],
)
def test_auto_takes_the_first_that_can(changes, wanted):
    choice = chosen(**changes)
    assert choice.name == wanted
    assert list(choice.rejected) == list(CAPABILITIES)[: list(CAPABILITIES).index(wanted)]
    assert all(choice.rejected.values())


@pytest.mark.parametrize("block_size", [4, 16, 256])
def test_without_triton_and_extra_libraries_torch_runs(block_size):
    choice = chosen(installed={"torch"}, block_size=block_size)
    assert choice.name == "torch"
    assert choice.rejected["flash_attn"] == "flash_attn is not installed"


@pytest.mark.parametrize("changes", [{}, {"chunks": True}, {"block_size": 16}, {"block_size": 4}])
def test_without_extra_libraries_our_own_kernel_meets_every_need(changes):
    assert chosen(installed={"triton", "torch"}, **changes).name == "triton"


@pytest.mark.parametrize("recipe", MODELS)
def test_our_own_kernel_serves_every_recipe_with_every_cache(recipe, tmp_path):
    config = load_config(recipe_path(recipe))
    text = AutoConfig.from_pretrained(write_config(recipe, tmp_path)).get_text_config()
    options = [AttentionOptions(1.0, chunk_size=getattr(text, "attention_chunk_size", None))]
    caches = (torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2)
    for capability, cache in itertools.product([(8, 0), (9, 0), (10, 0)], caches):
        shape = text.head_dim, text.head_dim, config.cache.block_size
        needs = AttentionNeeds.of(options, config.model.max_model_len, capability, torch.bfloat16, cache, *shape)
        assert needs.chunks == ("scout" in recipe)
        assert choose("auto", needs, {"triton", "torch"}).name == "triton"


def test_a_package_without_the_function_that_is_called_is_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "flash_attn", types.ModuleType("flash_attn"))
    assert "flash_attn" not in choosing.installed_backends()
    sys.modules["flash_attn"].flash_attn_varlen_func = print
    assert "flash_attn" in choosing.installed_backends()


@pytest.mark.parametrize(
    ("name", "changes", "why"),
    [
        ("flash_attn", {"block_size": 16}, "cache.block_size is 16, not a multiple of 256"),
        ("flash_attn", {"chunks": True}, "it has no chunked attention"),
        ("flashinfer", {"key_width": 80, "value_width": 80}, "heads are 80 and 80 wide"),
        ("flashinfer", {"alibi": True}, "it derives ALiBi slopes from the number of heads"),
        ("triton", {"capability": (7, 5)}, "it needs an Ampere or newer GPU"),
        ("triton", {"key_width": 1024, "value_width": 1024}, "heads are 1024 and 1024 wide, above 576 and 512"),
        *((name, {}, "a GPU runs flash_attn, flashinfer, triton, torch; use auto") for name in ("flex", "native")),
    ],
)
def test_a_named_backend_that_cannot_run_is_refused_with_the_reason(name, changes, why):
    with pytest.raises(ConfigError) as refusal:
        chosen(name=name, **changes)
    message = str(refusal.value)
    assert message.startswith(f"runtime.attention_backend is {name}, but ")
    assert why in message
    assert "\n" not in message


@pytest.mark.parametrize("name", sorted(set(CAPABILITIES) - {"torch"}))
def test_a_named_backend_that_is_not_installed_is_refused(name):
    with pytest.raises(ConfigError, match="is not installed; use auto"):
        chosen(name=name, installed={"torch"})


def test_every_need_is_met_by_some_backend():
    for dtype, width, block, chunks in itertools.product(
        (torch.float32, torch.bfloat16), (64, 80, 512), (1, 16, 256), (False, True)
    ):
        changes = {"dtype": dtype, "key_width": width, "block_size": block, "chunks": chunks}
        assert chosen(**changes).name in CAPABILITIES


def test_needs_are_what_any_layer_asks_for():
    layers = [AttentionOptions(1.0, softcap=50.0), AttentionOptions(1.0, sliding_window=8, chunk_size=512)]
    rest = ((9, 0), torch.bfloat16, torch.bfloat16, 128, 128, 16)
    needs = AttentionNeeds.of(layers, 1024, *rest)
    assert needs.chunks
    assert not needs.alibi
    assert AttentionNeeds.of([*layers, AttentionOptions(1.0, alibi=torch.ones(4))], 1024, *rest).alibi
    assert not AttentionNeeds.of(layers, 512, *rest).chunks, "no sequence outgrows a chunk"
    assert not AttentionNeeds.of(layers[:1], 1024, *rest).chunks


def test_the_log_names_the_choice_and_why_others_were_refused(caplog, monkeypatch):
    monkeypatch.setattr(choosing, "installed_backends", lambda: {"torch"})
    with caplog.at_level(logging.INFO):
        backend = make_gpu_backend("auto", torch.device("cpu"), HOPPER)
    assert backend.name == "torch"
    (record,) = caplog.records
    assert record.levelno == logging.WARNING, "it is slow and was not requested"
    assert record.getMessage() == (
        "attention runs on torch (not flash_attn: flash_attn is not installed; not flashinfer: flashinfer is not "
        "installed; not triton: triton is not installed)"
    )


def test_a_gpus_backend_is_refused_on_a_cpu():
    with pytest.raises(ConfigError, match=r"runtime\.attention_backend is 'flashinfer'"):
        make_backend("flashinfer", torch.device("cpu"))
