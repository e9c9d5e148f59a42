"""Which library is loaded: a shipped one, one compiled for a level, or one compiled for this processor."""

import subprocess

import pytest

from ulysses_infer.native import levels, library
from ulysses_infer.native.compiler import FLAGS, FOLDER, STRICT, NativeUnavailableError, find_compiler, sources

ZEN_3 = "sse4_2 ssse3 popcnt cx16 avx2 fma f16c bmi1 bmi2 movbe abm"
ZEN_4 = ZEN_3 + " avx512f avx512bw avx512cd avx512dq avx512vl avx512_vnni avx512_bf16"


@pytest.fixture
def processor(tmp_path, monkeypatch):
    """Returns a function that makes this an x86 processor with the given flags."""
    monkeypatch.setattr(levels.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(levels, "CPU_INFO", tmp_path / "cpuinfo")
    monkeypatch.setattr(library, "SHIPPED", tmp_path / "built")
    monkeypatch.setattr(library, "built", lambda source, flags: (source.name, *flags))
    monkeypatch.delenv(library.LEVEL, raising=False)
    monkeypatch.delenv(library.SWITCH, raising=False)
    return lambda flags: (tmp_path / "cpuinfo").write_text(f"model name\t: made\nflags\t\t: fpu {flags}\n")


def ship(*names):
    for name in names:
        folder = library.SHIPPED / name
        folder.mkdir(parents=True)
        (folder / "matmul.so").touch()


@pytest.mark.parametrize(("flags", "best"), [("", None), (ZEN_3, "x86-64-v3"), (ZEN_4, "x86-64-v4-bf16")])
def test_levels_follow_the_processors_flags(processor, flags, best):
    processor(flags)
    found = [level.name for level in levels.levels_here()]
    assert found[0] == best if best else not found
    assert found[-1] == "x86-64-v2" if best else True


def test_the_best_shipped_library_is_taken(processor):
    ship("x86-64-v2", "x86-64-v3", "x86-64-v4-bf16")
    processor(ZEN_3)
    assert library.library_path("matmul") == library.SHIPPED / "x86-64-v3" / "matmul.so"
    processor(ZEN_4)
    assert library.library_path("matmul") == library.SHIPPED / "x86-64-v4-bf16" / "matmul.so"
    processor("")
    assert library.library_path("matmul") == ("matmul.c", "-march=native")


def test_a_wanted_level_is_shipped_or_compiled(processor, monkeypatch):
    processor(ZEN_4)
    monkeypatch.setenv(library.LEVEL, "x86-64-v3")
    assert library.library_path("matmul") == ("matmul.c", "-march=x86-64-v3")
    ship("x86-64-v3", "x86-64-v4-bf16")
    assert library.library_path("matmul") == library.SHIPPED / "x86-64-v3" / "matmul.so"
    monkeypatch.setenv(library.LEVEL, "native")
    assert library.library_path("matmul") == ("matmul.c", "-march=native")


def test_a_level_that_the_processor_does_not_have_is_refused_by_name(processor, monkeypatch):
    processor(ZEN_3)
    monkeypatch.setenv(library.LEVEL, "x86-64-v4")
    with pytest.raises(NativeUnavailableError, match=r"x86-64-v4 is not a level .* native, x86-64-v3, x86-64-v2"):
        library.library_path("matmul")


def test_native_code_can_be_switched_off(processor, monkeypatch):
    monkeypatch.setenv(library.SWITCH, "0")
    with pytest.raises(NativeUnavailableError, match="ULYSSES_INFER_NATIVE=0"):
        library.library_path("matmul")


@pytest.mark.parametrize(
    "name",
    [
        "x86-64-v4-bf16",
        "x86-64-v3-vnni",
        pytest.param("x86-64-v4-vnni", marks=pytest.mark.thorough),
        pytest.param("x86-64-v4", marks=pytest.mark.thorough),
    ],
)
def test_compilers_accept_the_sources_for_processors_that_are_not_here(name):
    """Users of those processors compile them; only syntax and names are checked, which takes seconds."""
    wanted = next((level for level in levels.levels_of_machine() if level.name == name), None)
    if wanted is None or wanted in levels.levels_here():
        pytest.skip(f"{name} is of another machine, or compiled by other tests")
    try:
        compiler = find_compiler()
    except NativeUnavailableError as error:
        pytest.skip(str(error))
    command = [*compiler, *FLAGS, *STRICT, *wanted.flags, f"-I{FOLDER}", "-fsyntax-only", *map(str, sources())]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
