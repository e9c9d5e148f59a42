"""The adapter to flashinfer's attention over latents, over a stand-in of the library, and when it is chosen."""

from __future__ import annotations

import dataclasses
import itertools
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.attention.cuda_fakes import check_int32, paged
from tests.attention.test_cuda_adapters import BLOCK_SIZE, CASES, NUM_BLOCKS, make_metadata
from ulysses_infer.attention.backend import AttentionMetadata, AttentionOptions, KernelAttention
from ulysses_infer.attention.flashinfer_latent import FlashInferLatentAttention
from ulysses_infer.attention.selection import AttentionNeeds, choose
from ulysses_infer.attention.torch_loop import TorchLoopAttention
from ulysses_infer.model.layers.latent import LatentAttention, LatentWidths
from ulysses_infer.parallel.layout import Mode, Place

CPU = torch.device("cpu")
LATENT, ROTARY, HEADS = 12, 4, 6
HOPPER = AttentionNeeds((9, 0), torch.bfloat16, torch.bfloat16, 576, 512, block_size=16, latents=True)


class Wrapper:
    """`BatchMLAPagedAttentionWrapper` of flashinfer 0.7, in plain torch."""

    def __init__(
        self,
        float_workspace_buffer: torch.Tensor,
        use_cuda_graph: bool = False,
        qo_indptr: torch.Tensor | None = None,
        kv_indptr: torch.Tensor | None = None,
        kv_indices: torch.Tensor | None = None,
        kv_len_arr: torch.Tensor | None = None,
        backend: str = "auto",
    ) -> None:
        self.plans, self.runs = 0, 0
        self.buffers = [qo_indptr, kv_indptr, kv_len_arr, kv_indices] if use_cuda_graph else []
        assert use_cuda_graph == (backend in ("fa2", "fa3")), "others cannot be planned again"

    def plan(
        self,
        qo_indptr: torch.Tensor,
        kv_indptr: torch.Tensor,
        kv_indices: torch.Tensor,
        kv_len_arr: torch.Tensor,
        num_heads: int,
        head_dim_ckv: int,
        head_dim_kpe: int,
        page_size: int,
        causal: bool,
        sm_scale: float,
        q_data_type: torch.dtype,
        kv_data_type: torch.dtype,
    ) -> None:
        check_int32(qo_indptr, kv_indptr, kv_indices, kv_len_arr)
        assert causal
        if self.buffers:
            *exact, places = self.buffers
            assert [len(each) for each in exact] == [len(qo_indptr), len(kv_indptr), len(kv_len_arr)]
            assert len(places) >= len(kv_indices)
        assert (q_data_type, kv_data_type) == (torch.float32, torch.float32)
        self.pages = [kv_indices[start:stop].tolist() for start, stop in itertools.pairwise(kv_indptr.tolist())]
        self.starts, self.contexts, self.scale = qo_indptr.tolist(), kv_len_arr.tolist(), sm_scale
        self.shapes = (num_heads, head_dim_ckv), (num_heads, head_dim_kpe), page_size
        self.plans += 1

    def run(
        self, q_nope: torch.Tensor, q_pe: torch.Tensor, ckv_cache: torch.Tensor, kpe_cache: torch.Tensor
    ) -> torch.Tensor:
        assert (q_nope.shape[1:], q_pe.shape[1:], ckv_cache.shape[1]) == self.shapes
        assert all(tensor.stride(-1) == 1 for tensor in (q_nope, q_pe, ckv_cache, kpe_cache))
        self.runs += 1
        query, keys = torch.cat((q_nope, q_pe), -1), torch.cat((ckv_cache, kpe_cache), -1)[:, :, None]
        values = ckv_cache[:, :, None]
        output: torch.Tensor = paged(query, keys, values, self.starts, self.contexts, self.pages, self.scale, -1, 0)[0]
        return output


class Loop(TorchLoopAttention, KernelAttention):
    """Stands for the Triton kernel."""


class Library:
    """The module `flashinfer`; it keeps the wrappers made from it."""

    def __init__(self) -> None:
        self.wrappers: list[Wrapper] = []
        self.mla = SimpleNamespace(BatchMLAPagedAttentionWrapper=self._make)

    def _make(self, *arguments: Any, **options: Any) -> Wrapper:
        self.wrappers.append(Wrapper(*arguments, **options))
        return self.wrappers[-1]

    @property
    def plans(self) -> int:
        return sum(wrapper.plans for wrapper in self.wrappers)

    @property
    def runs(self) -> int:
        return sum(wrapper.runs for wrapper in self.wrappers)


def make() -> tuple[FlashInferLatentAttention, Library]:
    library = Library()
    backend = FlashInferLatentAttention(library, CPU, Loop())
    return backend, library


def inputs(case: str) -> tuple[Any, ...]:
    draw = torch.Generator().manual_seed(0)
    metadata = make_metadata(*CASES[case])
    keys = torch.randn(NUM_BLOCKS, BLOCK_SIZE, 1, LATENT + ROTARY, generator=draw)
    query = torch.randn(sum(metadata.query_lens), HEADS, LATENT + ROTARY, generator=draw)
    return query, keys, keys[..., :LATENT], metadata


@pytest.mark.parametrize("case", CASES)
def test_latents_are_attended_to_as_the_torch_loop_does(case: str) -> None:
    backend, library = make()
    for _ in range(2):
        given = *inputs(case), AttentionOptions(0.4)
        for _ in range(3):  # layers
            expected = TorchLoopAttention().attend(*given)
            torch.testing.assert_close(backend.attend(*given), expected, atol=2e-5, rtol=2e-5)
    assert (library.plans, library.runs) == (2, 6)


def test_another_scale_has_a_plan_of_its_own() -> None:
    backend, library = make()
    given = inputs("decodes")
    for scaling in (0.4, 0.2, 0.4):
        expected = TorchLoopAttention().attend(*given, AttentionOptions(scaling))
        torch.testing.assert_close(backend.attend(*given, AttentionOptions(scaling)), expected, atol=2e-5, rtol=2e-5)
    assert library.plans == 2


def test_captured_steps_have_wrappers_of_their_own_and_are_planned_again() -> None:
    backend, library = make()
    query, keys, values, metadata = inputs("decodes")
    assert metadata.kernel is not None
    static = dataclasses.replace(metadata.kernel, captured=True)
    captured = dataclasses.replace(metadata, kernel=static)
    for _ in range(2):  # layers
        backend.attend(query, keys, values, captured, AttentionOptions(0.4))
    later = make_metadata((1, 1, 1), (2, 8, 19), seed=5)
    assert later.kernel is not None
    backend.replan(static, later.kernel.host)
    expected = TorchLoopAttention().attend(query, keys, values, later, AttentionOptions(0.4))
    torch.testing.assert_close(
        backend.attend(query, keys, values, captured, AttentionOptions(0.4)), expected, atol=2e-5, rtol=2e-5
    )
    backend.attend(query, keys, values, metadata, AttentionOptions(0.4))
    assert [(bool(each.buffers), each.plans, each.runs) for each in library.wrappers] == [(True, 2, 3), (False, 1, 1)]


@pytest.mark.parametrize("kind", ["expanded", "window"])
def test_what_the_kernel_lacks_is_left_to_the_other_backend(kind: str) -> None:
    backend, library = make()
    query, keys, values, metadata = inputs("chunks and decodes")
    values = values.contiguous() if kind == "expanded" else values
    options = AttentionOptions(0.4, sliding_window=5 if kind == "window" else None)
    expected = TorchLoopAttention().attend(query, keys, values, metadata, options)
    assert torch.equal(backend.attend(query, keys, values, metadata, options), expected)
    assert library.runs == 0


@pytest.mark.parametrize("case", CASES)
def test_a_layer_on_a_gpu_divides_a_step_as_one_on_a_cpu(case: str) -> None:
    widths, draw = LatentWidths(LATENT, ROTARY, 5, 7), torch.Generator().manual_seed(1)
    weight = torch.randn(HEADS * 12, LATENT, generator=draw)
    layer = LatentAttention(widths, SimpleNamespace(reader=lambda _: lambda _: weight), Place(Mode(1, 1), 0, 1))
    _, keys, values, metadata = inputs(case)
    query = torch.randn(sum(metadata.query_lens), HEADS, 5 + ROTARY, generator=draw)
    on_cpu = AttentionMetadata(metadata.slots, metadata.query_lens, metadata.context_lens, metadata.block_tables)
    expected = layer.attend(query, keys, values, TorchLoopAttention(), on_cpu, AttentionOptions(0.4))
    backend, library = make()
    found = layer.attend(query, keys, values, backend, metadata, AttentionOptions(0.4))
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=2e-5)
    assert library.runs == (0 if case == "a prompt" else 1)


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({}, "flashinfer"),
        ({"block_size": 256}, "flashinfer"),
        ({"key_width": 288, "value_width": 256}, "triton"),
        ({"cache_dtype": torch.float8_e4m3fn}, "triton"),
        ({"dtype": torch.float32, "cache_dtype": torch.float32}, "triton"),
    ],
)
def test_a_gpu_uses_the_kernel_for_latents_of_supported_widths(changes: dict[str, Any], wanted: str) -> None:
    choice = choose("auto", dataclasses.replace(HOPPER, **changes), {"flash_attn", "flashinfer", "triton", "torch"})
    assert choice.name == wanted


def test_expanded_latents_need_triton() -> None:
    assert choose("auto", HOPPER, {"flashinfer", "torch"}).name == "torch"
