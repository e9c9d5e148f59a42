"""Engines in plain Python start their own worker processes; nothing of them outlives the engine, however it ends."""

import contextlib
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from datetime import timedelta
from pathlib import Path

import psutil
import pytest
import torch

from tests.ranks import start_forked
from tests.tiny import settings
from ulysses_infer import SamplingParams, init_inference
from ulysses_infer.errors import CheckpointError, ConfigError, EngineDeadError, UnsupportedModelError

pytestmark = pytest.mark.distributed
ROOT = Path(__file__).resolve().parents[2]
GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
LONG = SamplingParams(temperature=0, max_tokens=120, ignore_eos=True)
SECONDS = 10.0
MARK = "ULYSSES_INFER_TESTS"  # tells these tests' workers from those of others on the machine


@pytest.fixture(autouse=True)
def no_traces(tmp_path_factory, monkeypatch):
    """Every test leaves no worker process and no folder of a model, within the time the engine promises."""
    monkeypatch.setenv(MARK, str(tmp_path_factory.getbasetemp()))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path_factory.mktemp("temporary")))
    yield
    deadline = time.monotonic() + SECONDS
    while (left := traces()) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not left


def traces():
    """Worker processes of these tests, and the folders by which models were handed to them."""
    processes = [process.pid for process in psutil.process_iter() if is_ours(process)]
    return processes + list(Path(tempfile.gettempdir()).glob("ulysses_infer_model_*"))


def is_ours(process):
    try:
        is_worker = "ulysses_infer.job.processes" in process.cmdline()
        return is_worker and process.environ().get(MARK) == os.environ[MARK]
    except (psutil.NoSuchProcess, psutil.ZombieProcess):
        return False


def shared_memory(pid):
    """Names of shared memory that a process maps."""
    return {entry.path for entry in psutil.Process(pid).memory_maps() if entry.path.startswith("/dev/shm")}


def start(folder, sp=2, **changes):
    return init_inference(folder, **settings(sp, 1, **changes))


def workers(engine):
    return [process.pid for process in engine._processes._processes]


def tokens(outputs):
    return [output.outputs[0].token_ids for output in outputs]


# -- engines in this process ---------------------------------------------------------------------------------------


@pytest.mark.thorough
def test_engines_follow_each_other_in_one_process(folder):
    environment, earlier = dict(os.environ), shared_memory(os.getpid())
    with init_inference(folder, **settings()) as alone:
        wanted = tokens(alone.generate(["hello", "a"], GREEDY))
    for make in (lambda: start(folder), lambda: in_a_thread(lambda: start(in_memory(folder)))):
        with make() as engine:
            assert tokens(engine.generate(["hello", "a"], GREEDY)) == wanted
            with pytest.raises(ConfigError, match="another engine or job; shut that down first"):
                start(folder)
            assert engine.tokenizer is not None
            pids = workers(engine)
            assert traces() == pids, "the folder that hands a model over is gone once all ranks have loaded it"
            assert not any(shared_memory(pid) - earlier for pid in [os.getpid(), *pids])
            time.sleep(1.0)  # workers check whether their parent process lives, not the thread that started them
            assert tokens(engine.generate(["hello", "a"], GREEDY)) == wanted
        assert not any(psutil.pid_exists(pid) for pid in pids)
        assert not torch.distributed.is_initialized()
    assert dict(os.environ) | {"DS_ACCELERATOR": "cpu"} == environment | {"DS_ACCELERATOR": "cpu"}


def in_memory(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def in_a_thread(make):
    """The result of `make` in a thread that has ended by now."""
    made = []
    thread = threading.Thread(target=lambda: made.append(make()))
    thread.start()
    thread.join()
    return made[0]


def generate_for_ever(engine):
    while True:
        engine.generate(["hello"] * 4, LONG)


@pytest.mark.parametrize(("sp", "rank"), [(2, 1), pytest.param(4, 3, marks=pytest.mark.thorough)])
def test_a_worker_killed_mid_generation_ends_the_engine_in_time_and_by_name(folder, sp, rank):
    with start(folder, sp=sp) as engine:
        victim = workers(engine)[rank - 1]
        threading.Timer(0.3, os.kill, (victim, signal.SIGKILL)).start()
        started = time.monotonic()
        with pytest.raises(EngineDeadError) as caught:
            generate_for_ever(engine)
        assert time.monotonic() - started < SECONDS
        assert str(caught.value) == f"the engine ended: worker rank {rank} was killed by SIGKILL"
        with pytest.raises(EngineDeadError, match="shut down"):
            engine.generate("hello")


@pytest.mark.thorough
def test_a_worker_that_died_while_idle_is_found_at_the_next_call(folder):
    with start(folder) as engine:
        os.kill(workers(engine)[0], signal.SIGKILL)
        time.sleep(0.2)
        with pytest.raises(EngineDeadError, match="worker rank 1 was killed by SIGKILL"):
            engine.generate("hello")


def test_a_worker_that_hangs_ends_the_engine_after_the_step_timeout(folder):
    with start(folder, **{"runtime.step_timeout": 1.5}) as engine:
        time.sleep(2.5)  # idle for longer than a step may take: nothing is hung
        engine.generate("hello", GREEDY)
        os.kill(workers(engine)[0], signal.SIGSTOP)
        started = time.monotonic()
        with pytest.raises(EngineDeadError) as caught:
            engine.generate("hello", LONG)
        assert 1.0 < time.monotonic() - started < SECONDS
        assert str(caught.value) == (
            "a step failed and the engine ended: another rank did not answer in time (runtime.step_timeout)"
        )


@pytest.mark.thorough
def test_a_stopped_worker_does_not_hold_up_the_shutdown_for_long(folder):
    with start(folder) as engine:
        os.kill(workers(engine)[0], signal.SIGSTOP)
        started = time.monotonic()
    assert time.monotonic() - started < SECONDS


# -- starts that fail ----------------------------------------------------------------------------------------------


def test_a_bad_checkpoint_is_one_error_and_leaves_no_process(folder, tmp_path, capfd):
    broken = tmp_path / "broken"
    broken.mkdir()
    for path in Path(folder).iterdir():
        (broken / path.name).write_bytes(path.read_bytes()[: 20_000 if path.suffix == ".safetensors" else None])
    with pytest.raises(CheckpointError, match="may be truncated"):
        start(str(broken))
    assert "Traceback" not in capfd.readouterr().err


def test_a_model_in_memory_that_cannot_be_served_leaves_no_folder():
    from transformers import DogeConfig, DogeForCausalLM

    small = DogeConfig(
        vocab_size=99,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    with pytest.raises(UnsupportedModelError, match="'doge' is not supported"):
        start(DogeForCausalLM(small))


@contextlib.contextmanager
def worker_startup(tmp_path, code):
    """Run `code` in every Python process started from here, before anything else."""
    (tmp_path / "sitecustomize.py").write_text(code)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
        yield


@pytest.mark.parametrize(
    ("end", "how"),
    [("os._exit(3)", "ended with exit code 3"), ("os.kill(os.getpid(), 9)", "was killed by SIGKILL")],
)
def test_a_worker_that_dies_before_the_ranks_meet_is_an_error_at_once(folder, tmp_path, end, how):
    code = f"import os\nif os.environ.get('LOCAL_RANK') == '1': {end}\n"
    started = time.monotonic()
    with (
        worker_startup(tmp_path, code),
        pytest.raises(EngineDeadError, match=f"the engine cannot start: worker rank 1 {how}"),
    ):
        start(folder)
    assert time.monotonic() - started < SECONDS


def test_a_worker_that_dies_while_the_groups_form_is_an_error(folder, tmp_path, monkeypatch):
    """Rank 0 then waits for it inside gloo, but not for long."""
    monkeypatch.setattr("ulysses_infer.parallel.groups.FORMING_TIMEOUT", timedelta(seconds=2))
    code = """
import os, sys, threading, time
def die():
    while not getattr(sys.modules.get("torch.distributed"), "is_initialized", lambda: False)():
        time.sleep(0.001)
    os._exit(3)
if os.environ.get("LOCAL_RANK") == "1":
    threading.Thread(target=die, daemon=True).start()
"""
    with worker_startup(tmp_path, code), pytest.raises(EngineDeadError) as caught:
        start(folder)
    assert str(caught.value) == "the engine ended: worker rank 1 ended with exit code 3"


# -- engines in processes of their own -----------------------------------------------------------------------------

PRELUDE = """
import os, signal, sys, time
from tests.tiny import settings
from ulysses_infer import SamplingParams, init_inference
long = SamplingParams(temperature=0, max_tokens=120, ignore_eos=True)
engine = init_inference(sys.argv[1], **settings(2))
print("workers", *[process.pid for process in engine._processes._processes], flush=True)
"""
FOREVER = """
while True:
    engine.generate("hello", long)
    print("step", flush=True)
"""


def heed_control_c():
    """A shell starts background jobs with SIGINT ignored, and their children inherit that."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@contextlib.contextmanager
def script(code, folder, stdin=False):
    """A Python process running `code` after the engine has started; stdin: as in a notebook cell."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    for name in ("RANK", "WORLD_SIZE"):
        environment.pop(name, None)
    command = [sys.executable, "-" if stdin else "-c", *([] if stdin else [PRELUDE + code]), folder]
    process = subprocess.Popen(
        command,
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=heed_control_c,
    )
    if stdin:
        process.stdin.write(PRELUDE + code)
    process.stdin.close()
    try:
        for line in process.stdout:
            if line.startswith("workers"):
                break
        yield process
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
        process.stderr.close()


def finish(process):
    """Exit code and what was printed from now on."""
    output, errors = process.stdout.read(), process.stderr.read()
    return process.wait(SECONDS), output, errors


@pytest.mark.thorough
def test_code_from_standard_input_works_and_may_end_without_shutdown(folder):
    code = "print(engine.generate('hello', long)[0].outputs[0].finish_reason)\n"
    with script(code, folder, stdin=True) as process:
        code, output, errors = finish(process)
    assert (code, output.split()) == (0, ["length"])
    assert "Traceback" not in errors


@pytest.mark.thorough
def test_an_exception_ends_the_workers_with_the_script(folder):
    with script("next(engine.stream('hello', long))\nraise KeyError('mine')", folder) as process:
        code, _, errors = finish(process)
    assert code == 1
    assert errors.strip().endswith("KeyError: 'mine'")


@pytest.mark.thorough  # of two, the second one does that too: below
def test_control_c_in_a_generation_ends_everything(folder):
    with script(FOREVER, folder) as process:
        process.stdout.readline()
        process.send_signal(signal.SIGINT)
        started = time.monotonic()
        code, _, errors = finish(process)
        assert time.monotonic() - started < SECONDS
    assert code in (-signal.SIGINT, 130)
    assert errors.strip().endswith("KeyboardInterrupt")
    assert "worker rank" not in errors


AGAIN = """
for presses in (1, 2):
    try:
        print("generating", flush=True)
        while True:
            engine.generate(["hello"] * 4, long)
    except KeyboardInterrupt:
        print("interrupted", flush=True)
        if presses == 2:
            time.sleep(5)
    stats = engine.stats()
    print(stats["num_requests_running"], len(engine.generate("hello", long)[0].outputs[0].token_ids), flush=True)
"""


def test_control_c_leaves_the_engine_usable_and_a_second_one_ends_it(folder):
    with script("import time\n" + AGAIN, folder) as process:
        assert process.stdout.readline() == "generating\n"
        time.sleep(0.3)
        process.send_signal(signal.SIGINT)
        assert [process.stdout.readline() for _ in range(3)] == ["interrupted\n", "0 120\n", "generating\n"]
        time.sleep(1.2)  # the next one is a first one again
        process.send_signal(signal.SIGINT)
        assert process.stdout.readline() == "interrupted\n"
        process.send_signal(signal.SIGINT)
        code, _, errors = finish(process)
    assert code in (-signal.SIGINT, 130)
    assert errors.strip().endswith("KeyboardInterrupt")


def test_workers_end_with_a_killed_parent(folder):
    ours, theirs = multiprocessing.Pipe()
    with ours:
        process = start_forked(generate_and_tell, folder, dict(os.environ), theirs)
        theirs.close()
        assert ours.recv() == "generating"
        assert traces()
        process.kill()
        process.join(SECONDS)
        assert process.exitcode == -signal.SIGKILL


def generate_and_tell(folder, environment, pipe):
    """Generate for ever; the pipe gets a word once an output is complete."""
    os.environ.update(environment)
    engine = start(folder)
    engine.generate("hello", GREEDY)
    pipe.send("generating")
    generate_for_ever(engine)
