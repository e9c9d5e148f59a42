"""The C files compiled for Arm and run by an emulator, against torch on this machine."""

import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from ulysses_infer.native.compiler import FLAGS, STRICT
from ulysses_infer.native.levels import LEVELS
from ulysses_infer.native.library import FOLDER

COMPILER, EMULATOR = "aarch64-linux-gnu-gcc", "qemu-aarch64"
HARNESSES = Path(__file__).parent / "arm"
ARM = {level.name: level.flags for level in LEVELS if level.machine == "aarch64"}
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
ROUNDING = {torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.float32: 1e-5}
pytestmark = [
    pytest.mark.thorough,
    pytest.mark.skipif(
        not shutil.which(COMPILER) or not shutil.which(EMULATOR),
        reason=f"needs {COMPILER} and {EMULATOR} (Debian: gcc-aarch64-linux-gnu libc6-dev-arm64-cross qemu-user)",
    ),
]


@pytest.fixture(scope="module", params=ARM)
def run(request, tmp_path_factory):
    """Returns a function that runs a harness, compiled for a level of Arm, on tensors."""
    folder = tmp_path_factory.mktemp(request.param)

    def call(harness, arguments, tensors, shape):
        program = folder / harness
        if not program.exists():
            flags = [*FLAGS, *STRICT, *ARM[request.param], "-static", f"-I{FOLDER}", f"-I{FOLDER.parent}"]
            source = str(HARNESSES / f"{harness}.c")
            subprocess.run([COMPILER, *flags, source, "-o", str(program), "-lm"], check=True)
        data = b"".join(tensor.contiguous().view(torch.uint8).numpy().tobytes() for tensor in tensors)
        command = [EMULATOR, "-cpu", "max", str(program), *map(str, arguments)]
        done = subprocess.run(command, input=data, capture_output=True, check=True, env={"OMP_NUM_THREADS": "2"})
        return torch.frombuffer(bytearray(done.stdout), dtype=tensors[0].dtype).view(shape)

    return call


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kernel", ["few", "panels"])
@pytest.mark.parametrize("rows", [3, 30])
def test_products(run, kernel, dtype, rows):
    torch.manual_seed(rows)
    x, weight, bias = (torch.randn(*shape).to(DTYPES[dtype]) for shape in ((rows, 301), (53, 301), (53,)))
    found = run("products", (dtype, kernel, rows, 53, 301), (x, weight, bias), (rows, 53))
    exact = F.linear(x.double(), weight.double(), bias.double())
    assert ((found.double() - exact).abs() <= exact.abs() * ROUNDING[DTYPES[dtype]] + 2e-4).all()


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("tokens", [5, 150])  # in rows and in tiles
def test_attention(run, dtype, tokens):
    torch.manual_seed(tokens)
    heads, groups, width = 2, 3, 40
    query = torch.randn(tokens, heads * groups, width).to(DTYPES[dtype])
    keys, values = (torch.randn(tokens, heads, width).to(DTYPES[dtype]) for _ in range(2))
    found = run("prompt", (dtype, tokens, heads, groups, width), (query, keys, values), query.shape)
    wide = [part.double().transpose(0, 1) for part in (query, keys, values)]
    exact = F.scaled_dot_product_attention(*wide, is_causal=True, scale=0.125, enable_gqa=True).transpose(0, 1)
    torch.testing.assert_close(
        found.double(), exact, rtol=ROUNDING[DTYPES[dtype]] * 2, atol=1e-2 if dtype != "float32" else 1e-5
    )


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_norms_and_activations(run, dtype):
    torch.manual_seed(0)
    x, y, weight = (torch.randn(*shape).to(DTYPES[dtype]) for shape in ((5, 77), (5, 77), (77,)))
    found = run("activations", (dtype, 5, 77), (x, y, weight), (2, 5, 77)).double()
    wide = x.double()
    normed = wide * (wide.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * weight.double()
    tolerance = 3 * ROUNDING[DTYPES[dtype]]
    torch.testing.assert_close(found[0], normed, rtol=tolerance, atol=1e-5)
    torch.testing.assert_close(found[1], F.silu(wide) * y.double(), rtol=tolerance, atol=1e-5)
