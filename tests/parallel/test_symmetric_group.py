"""Small messages between GPUs of one host: which way each takes, and that all ranks agree on having such memory.

Ranks are real processes, device and memory are not: kernels run in Triton's interpreter over files that all ranks map.
"""

from __future__ import annotations

import inspect
import logging
import os
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from tests.kernels.interpreter import use_exact_rounding
from tests.parallel.symmetric_files import FileAllocator
from ulysses_infer.errors import ConfigError
from ulysses_infer.kernels.launch import assume
from ulysses_infer.kernels.norm import rms_norm
from ulysses_infer.kernels.scaled_rows import NONE, ROW
from ulysses_infer.parallel import groups as groups_module
from ulysses_infer.parallel import shared_memory, symmetric_memory
from ulysses_infer.parallel.groups import build_groups
from ulysses_infer.parallel.layout import Layout, Mode, token_spans
from ulysses_infer.parallel.shared_group import SharedMemoryMailbox
from ulysses_infer.parallel.symmetric_group import SymmetricGroup, one_shot_bytes
from ulysses_infer.parallel.symmetric_memory import SMALL_BYTES, SymmetricMemory, TorchAllocator, memory_bytes
from ulysses_infer.parallel.torch_group import TorchMailbox, TorchProcessGroup

GPU = torch.device("cuda")


class Norm:
    """A residual norm whose own kernel is another one."""

    def __init__(self, weight: torch.Tensor, eps: float) -> None:
        self.weight, self.eps, self.calls = weight, eps, 0

    def add_and_norm(self, x, residual, kind=NONE):
        self.calls += 1
        return residual, rms_norm(x, self.weight, self.eps, residual, kind)


def build(folder, layout, collectives="auto", fails=None):
    """Groups of ranks that take themselves for GPUs; `fails`: by rank, as `FileAllocator`."""
    allocator = FileAllocator(folder, (fails or {}).get(int(os.environ["RANK"])))
    return build_groups(layout, layout.modes, GPU, collectives=collectives, allocator=allocator), allocator


# -- exchanges -----------------------------------------------------------------------------------------------------


def exchange_all(folder, world_size, tp):
    """Every mode: sums, norms and all-to-alls through memory equal those of gloo; one memory per group."""
    use_exact_rounding()
    layout = Layout(Mode(world_size // tp, tp))
    groups, allocator = build(folder, layout, "symmetric_memory")
    plain = build_groups(layout, layout.modes, GPU, collectives="torch")
    inputs = torch.Generator().manual_seed(groups.rank)
    alike = torch.Generator().manual_seed(99)
    with assume("cpu", (9, 0)):
        for mode in layout.modes:
            mine, theirs = groups.by_mode[mode], plain.by_mode[mode]
            for group in (mine.sp_group, mine.tp_group):
                assert group is None or type(group) is SymmetricGroup
            if mode.tp > 1:
                # Whole numbers, which no order of the sum rounds.
                partial = torch.randint(-9, 9, (3, 40), generator=inputs).float()
                assert torch.equal(mine.sum_over_tp(partial.clone()), theirs.sum_over_tp(partial.clone()))
                residual, weight = torch.randn(3, 40, generator=alike), torch.randn(40, generator=alike)
                norm = Norm(weight, 1e-5)
                fused = mine.sum_add_norm(partial.clone(), residual.clone(), norm)
                assert norm.calls == 0
                apart = theirs.sum_add_norm(partial.clone(), residual.clone(), norm)
                assert norm.calls == 1
                assert all(torch.equal(one, other) for one, other in zip(fused, apart, strict=True))
            if mode.sp > 1:
                exchange_slices(mode, mine, theirs, inputs)
    distinct = {id(g) for each in groups.by_mode.values() for g in (each.sp_group, each.tp_group)} - {id(None)}
    assert len(allocator.met) == len(distinct)
    for each in (groups, plain):
        each.close()


def exchange_slices(mode, mine, theirs, inputs):
    for num_tokens in (1, 6):
        spans = token_spans(num_tokens, mode.sp)
        local = spans[mine.place.token_index].size
        query = torch.randn(3 * mode.sp, local, 8, generator=inputs).transpose(0, 1)
        packed = torch.randn(mode.sp, local, 20, generator=inputs).transpose(0, 1)
        for sources in ((query, torch.randn(local, mode.sp, 6, generator=inputs)), (packed,)):
            found, expected = (each.tokens_to_heads(sources, spans) for each in (mine, theirs))
            assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
            assert [each.shape for each in found] == [each.shape for each in expected]
        output = torch.randn(num_tokens, 12, generator=inputs)
        assert torch.equal(mine.heads_to_tokens(output, spans), theirs.heads_to_tokens(output, spans))
        rows, counts = torch.randn(local, 5, generator=inputs), [span.size for span in spans]
        assert torch.equal(mine.gather_rows(rows, counts), theirs.gather_rows(rows, counts))


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("world_size", "tp"), [(2, 1), *(pytest.param(4, tp, marks=pytest.mark.thorough) for tp in (1, 2))]
)
def test_exchanges_through_memory_equal_those_of_torch(rank_pool, tmp_path, world_size, tp):
    rank_pool(world_size).run(exchange_all, str(tmp_path), world_size, tp)


# -- which way a message takes -------------------------------------------------------------------------------------


class Operators:
    """`torch.ops.symm_mem`: records calls after binding them to torch's own schemas."""

    def __init__(self) -> None:
        self.calls = []

    def __getattr__(self, name):
        import torch.distributed._symmetric_memory  # defines the real ones

        schema = getattr(REAL_OPERATORS, name).default._schema
        parameters = [
            inspect.Parameter(each.name, inspect.Parameter.POSITIONAL_OR_KEYWORD) for each in schema.arguments
        ]

        def call(*args):
            bound = inspect.Signature(parameters).bind(*args).arguments
            expected = {"Tensor": torch.Tensor, "str": str}
            for argument in schema.arguments:
                assert isinstance(bound[argument.name], expected[str(argument.type)]), argument
            self.calls.append((name, bound))
            return bound["input"].mul_(2)

        return call


REAL_OPERATORS = torch.ops.symm_mem


@pytest.fixture
def lone_group(monkeypatch):
    """`make(ranks, multicast)`: a group of which only this rank exists, its operators, and what NCCL is asked for."""
    monkeypatch.setattr(torch.distributed, "get_rank", lambda group: 0)
    operators, by_nccl, by_kernel = Operators(), [], []
    monkeypatch.setattr(torch.ops, "symm_mem", operators)
    monkeypatch.setattr(TorchProcessGroup, "sum", lambda self, partial: by_nccl.append(partial.nbytes))
    monkeypatch.setattr(
        "ulysses_infer.kernels.collectives.sum_in_place", lambda partial, peers: by_kernel.append(partial.nbytes)
    )

    def make(ranks, multicast):
        local = torch.zeros(memory_bytes(ranks), dtype=torch.uint8)
        memory = SymmetricMemory(local, [local.data_ptr()] * ranks, 0, "group 7", multicast)
        return SimpleNamespace(
            group=SymmetricGroup(None, memory), memory=memory, operators=operators, nccl=by_nccl, kernel=by_kernel
        )

    return make


@pytest.mark.parametrize(("multicast", "name"), [(True, "multimem_all_reduce_"), (False, "two_shot_all_reduce_")])
def test_middle_sums_use_operators_of_torch_as_torch_declares_them(lone_group, multicast, name):
    made = lone_group(8, multicast)
    partial = torch.ones(one_shot_bytes(8) // 2 + 8, dtype=torch.bfloat16)
    assert made.group.sum(partial) is partial
    ((called, bound),) = made.operators.calls
    assert called == name
    assert (bound["reduce_op"], bound["group_name"]) == ("sum", "group 7")
    staged = bound["input"]
    assert (staged.data_ptr(), staged.dtype, staged.shape) == (
        made.memory.local.data_ptr(),
        partial.dtype,
        partial.shape,
    )
    assert torch.equal(partial, torch.full_like(partial, 2)), "the result is copied back"
    assert (made.nccl, made.kernel) == ([], [])


def test_the_way_of_a_sum_depends_on_size_and_dtype_alone(lone_group):
    made = lone_group(8, True)
    small, large = one_shot_bytes(8), SMALL_BYTES
    assert small < large
    made.group.sum(torch.zeros(small // 2, dtype=torch.bfloat16))
    made.group.sum(torch.zeros(large // 2, dtype=torch.float16))  # torch's operators do not take it
    made.group.sum(torch.zeros(small // 2 + 1, dtype=torch.bfloat16))  # nor sizes that are not aligned
    assert made.kernel == [small, large, small + 2]
    made.group.sum(torch.zeros(large // 2 + 8, dtype=torch.bfloat16))
    made.group.sum(torch.zeros(16, 16).t()[:8])  # not dense
    made.group.sum(torch.zeros(4, dtype=torch.int64))
    assert made.nccl == [large + 16, 512, 32]
    assert made.operators.calls == []
    few = lone_group(4, False)
    few.group.sum(torch.zeros(large // 2, dtype=torch.bfloat16))
    assert few.kernel[-1] == large, "among few ranks one shot reads little more than two"


@pytest.mark.parametrize(
    ("change", "fuses"),
    [
        ({}, True),
        ({"rows": one_shot_bytes(8) // 512 + 1}, False),
        ({"weight_dtype": torch.float32}, False),
        ({"kind": ROW}, False),  # the CPU is not taken for a GPU with FP8 here
        ({"width": 1 << 15, "rows": 1}, False),
    ],
)
def test_norms_are_fused_where_the_kernel_fits(lone_group, monkeypatch, change, fuses):
    monkeypatch.setattr("ulysses_infer.kernels.collectives.sum_add_norm", lambda *args: args[0])
    case = {"rows": 3, "width": 256, "weight_dtype": torch.bfloat16, "kind": NONE} | change
    partial = torch.zeros(1, case["rows"], case["width"], dtype=torch.bfloat16)
    weight = torch.zeros(case["width"], dtype=case["weight_dtype"])
    found = lone_group(8, True).group.sum_add_norm(partial, partial.clone(), weight, 1e-5, case["kind"])
    assert (found is partial) == fuses


def test_torch_declares_what_the_allocator_calls():
    import torch.distributed._symmetric_memory as symmetric
    from torch._C._distributed_c10d import _SymmetricMemory

    with pytest.raises(RuntimeError, match="does not support device type cpu"):  # TypeError if it took other arguments
        _SymmetricMemory.empty_strided_p2p((8,), [1], torch.uint8, torch.device("cpu"))
    inspect.signature(symmetric.rendezvous).bind(torch.zeros(1), "group")
    for name in ("buffer_ptrs", "multicast_ptr", "rank"):
        assert isinstance(getattr(_SymmetricMemory, name), property), name
    for name in symmetric_memory.TORCH_OPERATORS:
        assert str(getattr(torch.ops.symm_mem, name).default._schema).count("str") == 2


class FakeHandle(SimpleNamespace):
    """What torch's rendezvous returns."""


def test_addresses_are_those_of_whole_mappings(monkeypatch):
    import torch.distributed._symmetric_memory as symmetric

    local, group = torch.zeros(64, dtype=torch.uint8), SimpleNamespace(group_name="group 7")
    handle = FakeHandle(buffer_ptrs=[local.data_ptr(), 4096], rank=0, multicast_ptr=0)
    monkeypatch.setattr(symmetric, "rendezvous", lambda tensor, process_group: handle)
    memory = TorchAllocator().meet(local, group)
    assert (memory.addresses, memory.has_multicast) == ([local.data_ptr(), 4096], False)
    assert (memory.group_name, memory.rank, memory.handle) == ("group 7", 0, handle)
    handle.buffer_ptrs[0] -= 16
    with pytest.raises(RuntimeError, match="another place"):
        TorchAllocator().meet(local, group)


def test_without_a_gpu_there_is_no_symmetric_memory():
    assert TorchAllocator().obstacle(torch.device("cpu")) == "there is no GPU"


# -- agreement -----------------------------------------------------------------------------------------------------


@contextmanager
def logged(lines):
    """Add what the building of groups logs to `lines`."""
    handler, level = logging.Handler(), groups_module.logger.level
    handler.emit = lambda record: lines.append(record.getMessage())
    groups_module.logger.addHandler(handler)
    groups_module.logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        groups_module.logger.setLevel(level)
        groups_module.logger.removeHandler(handler)


def build_and_report(folder, collectives, fails, hosts=None):
    """(types of this rank's group of all ranks and mailbox, sum over it, log lines), or the error of the config."""
    layout, lines = Layout(Mode(2, 1)), []
    with pytest.MonkeyPatch.context() as patch, assume("cpu", (9, 0)), logged(lines):
        if hosts is not None:
            host = hosts[int(os.environ["RANK"])]
            for module in (shared_memory, symmetric_memory):
                patch.setattr(module, "host_identity", lambda: host)
        try:
            groups, _ = build(folder, layout, collectives, fails)
        except ConfigError as error:
            return str(error)
        tp_group = groups.by_mode[layout.shift].tp_group
        total = float(tp_group.sum(torch.ones(3))[0])
        sent = send(groups)
        found = type(tp_group), type(groups.mailbox), total, sent, lines
        groups.close()
    return found


def send(groups):
    """A message from rank 0, as step plans are sent."""
    if not groups.is_first:
        return groups.mailbox.receive()
    groups.mailbox.send(b"step" * 5000)
    return b"step" * 5000


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("stage", "reason"),
    [
        ("obstacle", "torch lacks symm_mem::two_shot_all_reduce_"),
        ("reserve", "out of memory"),
        ("meet", "no peer access"),
        ("write", "what GPUs write to each other does not arrive"),
    ],
)
def test_one_rank_without_symmetric_memory_disables_it_on_all(rank_pool, tmp_path, stage, reason):
    fails = {1: {stage: reason}}
    first, second = rank_pool(2).run(build_and_report, str(tmp_path), "auto", fails)
    for found in (first, second):
        assert found[:4] == (TorchProcessGroup, SharedMemoryMailbox, 2.0, b"step" * 5000)
    shown = reason if stage == "write" else f"rank 1: {reason}"
    (line,) = first[4]
    assert line.startswith("collectives use torch: no symmetric memory: rank ")
    assert line.endswith(shown)
    assert second[4] == []
    (message,) = set(rank_pool(2).run(build_and_report, str(tmp_path), "symmetric_memory", fails))
    assert message.startswith("runtime.collectives = symmetric_memory, but rank ")
    assert message.endswith(f"{reason}; use auto or torch")


@pytest.mark.distributed
def test_gpus_of_one_host_share_memory_and_the_mailbox(rank_pool, tmp_path):
    first, second = rank_pool(2).run(build_and_report, str(tmp_path), "auto", None)
    assert first[:4] == second[:4] == (SymmetricGroup, SharedMemoryMailbox, 2.0, b"step" * 5000)
    assert (first[4], second[4]) == (["collectives use symmetric memory up to 512 KiB, torch above"], [])
    plain, _ = rank_pool(2).run(build_and_report, str(tmp_path), "torch", None)
    assert plain[:3] == (TorchProcessGroup, TorchMailbox, 2.0)
    assert plain[4] == ["collectives use torch: runtime.collectives = torch"]


@pytest.mark.distributed
def test_gpus_of_two_hosts_share_neither(rank_pool, tmp_path):
    first, second = rank_pool(2).run(build_and_report, str(tmp_path), "auto", None, ["here", "there"])
    assert first[:4] == second[:4] == (TorchProcessGroup, TorchMailbox, 2.0, b"step" * 5000)
    assert first[4] == [
        "step plans travel by gloo: the ranks are not on one host",
        "collectives use torch: no symmetric memory: the ranks are not on one host",
    ]


def build_on_cpus():
    layout = Layout(Mode(2, 1))
    with pytest.raises(ConfigError, match="symmetric_memory needs GPUs"):
        build_groups(layout, layout.modes, torch.device("cpu"), collectives="symmetric_memory")
    with pytest.raises(ConfigError, match="shared_memory, but tensors are not in CPU memory"):
        build_groups(layout, layout.modes, GPU, collectives="shared_memory")


@pytest.mark.distributed
def test_memory_of_the_other_kind_of_device_is_refused(rank_pool):
    rank_pool(2).run(build_on_cpus)
