"""The adapters' calls, and those of torch's own functions, fit the signatures of the releases that are supported."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from tests.attention import cuda_fakes, signatures, test_flashinfer_latent
from tests.attention.signatures import DECODE, LATENT, PREFILL, RELEASES, UnavailableError, download, kept, signature
from tests.attention.test_cuda_adapters import CASES, WIDTH, make_cache, make_metadata, make_options
from ulysses_infer.attention.backend import AttentionBackend, AttentionMetadata, AttentionOptions, KernelSequences
from ulysses_infer.attention.flash_attn import FlashAttnAttention
from ulysses_infer.attention.flashinfer import FlashInferAttention
from ulysses_infer.attention.flashinfer_latent import FlashInferLatentAttention

CPU = torch.device("cpu")
PACKAGE = Path(__file__).parents[2] / "ulysses_infer"
OPTIONS = ({}, {"sliding_window": 5}, {"softcap": 1.5}, {"sinks": True})


class Call:
    """A function of a library that takes what the real one takes, keeps its calls, and passes them to a stand-in."""

    def __init__(self, name: str, function: Callable[..., Any]) -> None:
        self._signature, self._function, self.calls = signature(name), function, list[dict[str, Any]]()

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        bound = self._signature.bind(*arguments, **named)
        kinds = {name: parameter.kind for name, parameter in self._signature.parameters.items()}
        assert inspect.Parameter.VAR_POSITIONAL not in {kinds[name] for name in bound.arguments}
        self.calls.append(bound.arguments)
        return self._function(*arguments, **named)


class Library:
    """flashinfer: the classes named, over the stand-ins of `cuda_fakes`."""

    def __init__(self, **stand_ins: type) -> None:
        self._stand_ins, self.calls = stand_ins, dict[str, list[dict[str, Any]]]()

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def make(*arguments: Any, **named: Any) -> Any:
            wrapper = self._call(f"{name}.__init__", self._stand_ins[name])(*arguments, **named)
            plan = "_plan_impl" if name == DECODE else "plan"
            wrapper.plan = self._call(f"{name}.{plan}", wrapper.plan)
            wrapper.run = self._call(f"{name}.run", wrapper.run)
            return wrapper

        return make

    def _call(self, name: str, function: Callable[..., Any]) -> Call:
        call = Call(name, function)
        call.calls = self.calls.setdefault(name, [])
        return call


def attend(backend: AttentionBackend, metadata: AttentionMetadata) -> None:
    """With every kind of option."""
    cache = make_cache(2)
    for kind in OPTIONS:
        backend.attend(torch.randn(sum(metadata.query_lens), 4, WIDTH), *cache, metadata, make_options(kind, 4))


def test_calls_of_flash_attn_fit() -> None:
    function = Call("flash_attn_varlen_func", cuda_fakes.flash_attn_varlen_func)
    for case in CASES.values():
        attend(FlashAttnAttention(function), make_metadata(*case))
    assert len(function.calls) == len(CASES) * len(OPTIONS)


def test_calls_of_flashinfer_fit() -> None:
    library = Library(**{DECODE: cuda_fakes.Decode, PREFILL: cuda_fakes.Prefill})
    backend = FlashInferAttention(library, CPU)
    for case in CASES.values():
        attend(backend, make_metadata(*case))
    metadata = make_metadata((1, 1), (3, 9))
    captured, host = captured_sequences(metadata)
    attend(backend, AttentionMetadata(metadata.slots, [1, 1], [], metadata.block_tables, captured))
    backend.replan(captured, host)
    assert {name for name, calls in library.calls.items() if calls} == names_of(DECODE, PREFILL)
    assert any(call.get("use_cuda_graph") for call in library.calls[f"{DECODE}.__init__"])


def captured_sequences(metadata: AttentionMetadata) -> tuple[KernelSequences, Any]:
    own = metadata.kernel
    assert own is not None
    tensors = own.cu_query_lens, own.cu_context_lens, own.context_lens, own.block_tables
    return KernelSequences(*tensors, 1, own.max_context_len, own.host, captured=True), own.host


def test_calls_of_flashinfer_for_latents_fit() -> None:
    library = Library(**{LATENT: test_flashinfer_latent.Wrapper})
    backend = FlashInferLatentAttention(SimpleNamespace(mla=library), CPU, test_flashinfer_latent.Loop())
    for case in CASES:
        backend.attend(*test_flashinfer_latent.inputs(case), AttentionOptions(0.4))
    query, keys, values, metadata = test_flashinfer_latent.inputs("decodes")
    captured, host = captured_sequences(metadata)
    own = AttentionMetadata(metadata.slots, [], [], metadata.block_tables, captured)
    backend.attend(query, keys, values, own, AttentionOptions(0.4))
    backend.replan(captured, host)
    assert any(call.get("use_cuda_graph") for call in library.calls[f"{LATENT}.__init__"])
    assert {name for name, calls in library.calls.items() if calls} == names_of(LATENT)


def names_of(*classes: str) -> set[str]:
    return {name for functions in RELEASES.values() for name in functions if name.partition(".")[0] in classes}


@pytest.mark.parametrize(
    ("function", "stand_in"),
    [
        ("flash_attn_varlen_func", cuda_fakes.flash_attn_varlen_func),
        (f"{DECODE}._plan_impl", cuda_fakes.Decode.plan),
        (f"{PREFILL}.plan", cuda_fakes.Prefill.plan),
        (f"{LATENT}.__init__", test_flashinfer_latent.Wrapper.__init__),
        (f"{LATENT}.plan", test_flashinfer_latent.Wrapper.plan),
        (f"{LATENT}.run", test_flashinfer_latent.Wrapper.run),
        (f"{DECODE}.run", cuda_fakes.Wrapper.run),
        (f"{PREFILL}.run", cuda_fakes.Wrapper.run),
    ],
)
def test_the_stand_ins_know_no_other_arguments(function: str, stand_in: Callable[..., Any]) -> None:
    real = signature(function).parameters
    known = [name for name in inspect.signature(stand_in).parameters if name != "self"]
    assert set(known) <= set(real)
    positional = [name for name, each in real.items() if each.kind == inspect.Parameter.POSITIONAL_OR_KEYWORD]
    required = [name for name in positional if name in known]
    assert positional[: len(required)] == required


def test_a_renamed_argument_is_noticed() -> None:
    function = Call("flash_attn_varlen_func", cuda_fakes.flash_attn_varlen_func)
    with pytest.raises(TypeError, match="block_tables"):
        function(*[None] * 7, block_tables=None)
    library = Library(**{DECODE: cuda_fakes.Decode})
    wrapper = getattr(library, DECODE)(torch.zeros(8, dtype=torch.uint8), "NHD")
    with pytest.raises(TypeError, match="too many positional"):
        wrapper.plan(*[None] * 8)
    with pytest.raises(AssertionError):
        wrapper.run(None, None, None)


@pytest.mark.thorough
@pytest.mark.parametrize("release", RELEASES)
def test_the_kept_signatures_are_those_of_the_release(release: str) -> None:
    try:
        archive = download(release)
    except UnavailableError as error:
        pytest.skip(str(error))
    found = signatures.read(archive, RELEASES[release])
    assert {name: [list(each) for each in parameters] for name, parameters in found.items()} == kept()[release]


# -- torch's own functions -----------------------------------------------------------------------------------------


def of_operator(operator: Any) -> inspect.Signature:
    """The signature of an operator, from its schema."""
    kinds = {False: inspect.Parameter.POSITIONAL_OR_KEYWORD, True: inspect.Parameter.KEYWORD_ONLY}
    return inspect.Signature(
        [
            inspect.Parameter(
                each.name, kinds[each.kwarg_only], default=None if each.has_default_value() else inspect.Parameter.empty
            )
            for each in operator._schema.arguments
        ]
    )


TORCH_FUNCTIONS = {
    "torch._scaled_mm": of_operator(torch.ops.aten._scaled_mm.default),
    "torch._scaled_grouped_mm": of_operator(torch.ops.aten._scaled_grouped_mm.default),
    "F.scaled_mm": inspect.signature(F.scaled_mm),
    "F.grouped_mm": inspect.signature(F.grouped_mm),
}


def calls_of(function: str) -> Iterator[tuple[str, ast.Call]]:
    """The calls in this package, with their places."""
    for path in sorted(PACKAGE.rglob("*.py")):
        if function.rpartition(".")[2] not in (text := path.read_text()):
            continue
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == function:
                yield f"{path.relative_to(PACKAGE)}:{node.lineno}", node


@pytest.mark.parametrize("function", TORCH_FUNCTIONS)
def test_calls_of_torch_fit(function: str) -> None:
    calls = list(calls_of(function))
    assert calls
    for place, call in calls:
        named = [keyword.arg for keyword in call.keywords]
        assert None not in named, place
        assert not any(isinstance(argument, ast.Starred) for argument in call.args), place
        TORCH_FUNCTIONS[function].bind(*call.args, **{str(name): None for name in named})


def test_operators_of_symmetric_memory_take_what_they_are_given() -> None:
    import torch.distributed._symmetric_memory as symmetric

    from ulysses_infer.parallel.symmetric_memory import TORCH_OPERATORS

    for name in TORCH_OPERATORS:
        arguments = getattr(torch.ops.symm_mem, name).default._schema.arguments
        assert [str(each.type) for each in arguments] == ["Tensor", "str", "str"]
    inspect.signature(symmetric.rendezvous).bind(torch.empty(0), None)
