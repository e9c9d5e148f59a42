"""The real kernels and real graphs on a GPU against the torch loop; skipped without one."""

import pytest
import torch

from tests.attention.test_cuda_adapters import CASES, KINDS, make_options
from tests.tiny import settings as engine_settings
from ulysses_infer import SamplingParams, init_inference
from ulysses_infer.attention.backend import AttentionMetadata, HostSequences, KernelSequences, running_sums
from ulysses_infer.attention.selection import AttentionNeeds, choose, installed_backends, make_gpu_backend
from ulysses_infer.attention.torch_loop import TorchLoopAttention
from ulysses_infer.errors import ConfigError

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
NUM_BLOCKS, WIDTH, HEADS = 16, 128, (8, 2)


def make_metadata(lengths, contexts, block_size):
    """The sequences, with the blocks of each in descending order."""
    tables, free = torch.zeros(len(contexts), -(-max(contexts) // block_size), dtype=torch.int32), NUM_BLOCKS
    for row, context in enumerate(contexts):
        for column in range(-(-context // block_size)):
            free -= 1
            tables[row, column] = free
    ints = torch.tensor(lengths, dtype=torch.int32).numpy(), torch.tensor(contexts, dtype=torch.int32).numpy()
    host = HostSequences(*ints, tables.numpy())
    arrays = running_sums(ints[0]), running_sums(ints[1]), ints[1], host.block_tables
    kernel = KernelSequences(*(torch.tensor(a, device="cuda") for a in arrays), max(lengths), max(contexts), host)
    slots = torch.zeros(sum(lengths), dtype=torch.int64, device="cuda")
    return AttentionMetadata(slots, list(lengths), list(contexts), kernel.block_tables.long(), kernel)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("name", "block_size"),
    [
        ("flash_attn", 256),
        ("flashinfer", 16),
        ("flashinfer", 256),
        ("triton", 16),
        ("triton", 256),
    ],
)
def test_a_kernel_attends_as_the_torch_loop_does(name, block_size, kind, case):
    fields = KINDS[kind]
    needs = AttentionNeeds(
        torch.cuda.get_device_capability(),
        torch.bfloat16,
        torch.bfloat16,
        WIDTH,
        WIDTH,
        block_size,
        "chunk_size" in fields,
    )
    try:
        choose(name, needs, installed_backends())
    except ConfigError as error:
        pytest.skip(str(error))
    torch.manual_seed(0)
    lengths, contexts = CASES[case]
    shape = (NUM_BLOCKS, block_size, HEADS[1], WIDTH)
    keys, values = (torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    query = torch.randn(sum(lengths), HEADS[0], WIDTH, device="cuda", dtype=torch.bfloat16)
    options = make_options({**fields, "scaling": WIDTH**-0.5}, HEADS[0], "cuda")
    inputs = query, keys, values, make_metadata(lengths, contexts, block_size), options
    output = make_gpu_backend(name, torch.device("cuda"), needs).attend(*inputs)
    torch.testing.assert_close(output, TorchLoopAttention().attend(*inputs), atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("backend", ["flash_attn", "flashinfer", "triton"])
def test_captured_steps_give_the_tokens_of_eager_ones(tmp_path, backend):
    if backend not in installed_backends():
        pytest.skip(f"{backend} is not installed")
    from tests.tiny import tiny_llama

    tiny_llama(tmp_path, head_dim=64)
    prompts = [[5, 6, 7], list(range(8, 40)), [9]]
    params = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
    found = []
    for eager in (True, False):
        changes = engine_settings(
            **{
                "runtime.device": "cuda",
                "runtime.enforce_eager": eager,
                "runtime.attention_backend": backend,
                "model.dtype": "bfloat16",
                "cache.block_size": 256,
            }
        )
        with init_inference(str(tmp_path), **changes) as engine:
            outputs = engine.generate(prompts, params)
            found.append([output.outputs[0].token_ids for output in outputs])
    assert found[0] == found[1]
