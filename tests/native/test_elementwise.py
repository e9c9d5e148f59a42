"""The elementwise kernels round where transformers' own code rounds: results are equal, or an ulp apart."""

from __future__ import annotations

import pytest
import torch

from tests.native.building import X86, build_for
from ulysses_infer.model.fusion import elementwise
from ulysses_infer.model.fusion.elementwise import ACTIVATIONS, NativeElementwise, make_elementwise
from ulysses_infer.model.fusion.torch_elementwise import TorchElementwise
from ulysses_infer.native.library import is_available

pytestmark = pytest.mark.skipif(not is_available("elementwise"), reason="no C compiler here")
DTYPES = (torch.bfloat16, torch.float32)
ULP = {torch.bfloat16: 2**-7, torch.float32: 2**-21}
SHAPES = [(1, 64), (3, 100), (5, 17), (130, 1536)]  # whole and broken vectors; one row, several, enough for threads


@pytest.fixture(params=X86, autouse=True)
def architecture(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test runs on this processor's code and on that of older ones."""
    monkeypatch.setattr(elementwise, "open_library", lambda name: build_for(name, request.param))


def pair(dtype: torch.dtype) -> tuple[NativeElementwise, TorchElementwise]:
    """Ours, and what it must equal."""
    return NativeElementwise(dtype), TorchElementwise(dtype)


def draw(*shape: int, dtype: torch.dtype, scale: float = 1.0) -> torch.Tensor:
    """The same random numbers every time."""
    generator = torch.Generator().manual_seed(sum(shape))
    return (torch.randn(shape, generator=generator) * scale).to(dtype)


def assert_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    """An ulp apart at most, and nearly everywhere equal."""
    torch.testing.assert_close(found, expected, rtol=ULP[expected.dtype], atol=1e-6)
    if expected.dtype == torch.bfloat16:
        equal = torch.isclose(found, expected, rtol=0, atol=1e-6)  # torch's tanh loses small tails, ours does not
        assert equal.float().mean() > 0.98


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rms_norm_is_llamas(shape: tuple[int, int], dtype: torch.dtype) -> None:
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    norm = LlamaRMSNorm(shape[1], eps=1e-5).to(dtype)
    norm.weight.data = draw(shape[1], dtype=dtype)
    x = draw(*shape, dtype=dtype, scale=3.0)
    with torch.inference_mode():
        assert_close(NativeElementwise(dtype).rms_norm(x, norm.weight, 1e-5), norm(x))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_residual_sum_and_its_norm(shape: tuple[int, int], dtype: torch.dtype) -> None:
    native, plain = pair(dtype)
    x, residual, weight = draw(*shape, dtype=dtype), draw(*shape, dtype=dtype, scale=2.0), draw(shape[1], dtype=dtype)
    expected_sum, expected = plain.add_rms_norm(x, residual, weight, 1e-6)
    found_sum, found = native.add_rms_norm(x, residual.clone(), weight, 1e-6)
    assert torch.equal(found_sum, expected_sum)
    assert_close(found, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [1, 7, 600])
def test_rotary_positions_are_llamas(tokens: int, dtype: torch.dtype) -> None:
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    query, key = draw(tokens, 6, 16, dtype=dtype), draw(tokens, 2, 16, dtype=dtype)
    cosine, sine = draw(tokens, 16, dtype=dtype), draw(tokens + 1, 16, dtype=dtype)[1:]
    heads_first = (x.transpose(0, 1)[None] for x in (query, key))
    expected = [x[0].transpose(0, 1) for x in apply_rotary_pos_emb(*heads_first, cosine[None], sine[None])]
    for x, wanted in zip(NativeElementwise(dtype).apply_rotary(query, key, cosine, sine), expected, strict=True):
        assert_close(x, wanted.contiguous())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rotated", [16, 8])
def test_heads_of_a_packed_projection_are_rotated_where_they_are(rotated: int, dtype: torch.dtype) -> None:
    native, plain = pair(dtype)
    packed = draw(5, (4 + 2 + 2) * 16, dtype=dtype)
    query, key, value = (x.view(5, -1, 16) for x in packed.split([64, 32, 32], dim=-1))
    untouched = value.clone()
    cosine, sine = draw(5, rotated, dtype=dtype), draw(5, rotated, dtype=dtype, scale=0.5)
    expected = plain.apply_rotary(query, key, cosine, sine)
    found = native.apply_rotary(query, key, cosine, sine)
    for x, wanted in zip(found, expected, strict=True):
        assert_close(x, wanted)
    assert found[0].data_ptr() == packed.data_ptr()
    assert torch.equal(value, untouched)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gated_activations_are_torchs(shape: tuple[int, int], activation: str, dtype: torch.dtype) -> None:
    native, plain = pair(dtype)
    gate, up = draw(*shape, dtype=dtype, scale=4.0), draw(*shape[::-1], dtype=dtype).view(shape)
    assert_close(native.gated(activation, gate, up), plain.gated(activation, gate, up))
    packed = torch.cat((gate, up), dim=-1)[None]
    found = native.gated(activation, *packed.chunk(2, dim=-1))
    assert_close(found[0], plain.gated(activation, gate, up))
    interleaved = torch.stack((gate, up), dim=-1)
    assert_close(native.gated(activation, *interleaved.unbind(-1)), plain.gated(activation, gate, up))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_of_extreme_values_are_finite_and_nan_stays_nan(activation: str) -> None:
    gate = torch.tensor([[-1e30, -300.0, -90.0, -0.0, 0.0, 90.0, 300.0, float("nan")]])
    native, plain = pair(torch.float32)
    ones = torch.ones_like(gate)
    expected = plain.gated(activation, gate, ones)
    found = native.gated(activation, gate, ones)
    torch.testing.assert_close(found[:, 1:], expected[:, 1:], rtol=1e-6, atol=1e-30, equal_nan=True)


def test_results_do_not_depend_on_the_rows_beside_them() -> None:
    native = NativeElementwise(torch.bfloat16)
    x, weight = draw(130, 1536, dtype=torch.bfloat16), draw(1536, dtype=torch.bfloat16)
    assert torch.equal(native.rms_norm(x, weight, 1e-5)[7:8], native.rms_norm(x[7:8], weight, 1e-5))
    assert torch.equal(native.gated("silu", x, x)[7:8], native.gated("silu", x[7:8], x[7:8]))


def test_other_types_and_devices_are_left_to_torch() -> None:
    assert isinstance(make_elementwise(torch.float16, torch.device("cpu")), TorchElementwise)
    assert isinstance(make_elementwise(torch.bfloat16, torch.device("cuda")), TorchElementwise)
    assert isinstance(make_elementwise(torch.bfloat16, torch.device("cpu")), NativeElementwise)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["default", "linear", "yarn"])
def test_rotary_angles_are_those_of_transformers(kind: str, dtype: torch.dtype) -> None:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    config = LlamaConfig(hidden_size=256, num_attention_heads=4, max_position_embeddings=4096)
    stretched = {"rope_type": kind, "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 1024}
    config.rope_parameters = {"rope_type": kind, "rope_theta": 1e4} if kind == "default" else stretched
    source = LlamaRotaryEmbedding(config)
    positions = torch.cat((torch.arange(300), torch.tensor([4095, 131071])))
    expected = source(torch.zeros(1, 1, 1, dtype=dtype), positions[None])
    for made in pair(dtype):
        found = made.rotary(positions, source.inv_freq, float(source.attention_scaling))
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one[None], other, rtol=ULP[dtype], atol=2e-7 if dtype == torch.float32 else 4e-3)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_of_a_table_are_taken(dtype: torch.dtype) -> None:
    table, ids = draw(50, 33, dtype=dtype), torch.tensor([3, 49, 0, 3])
    for made in pair(dtype):
        assert torch.equal(made.embed(ids, table), table[ids])
