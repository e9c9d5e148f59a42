"""Peak host memory while loading, measured in a separate process."""

import multiprocessing
import threading
from pathlib import Path

import pytest
import torch

from tests.ranks import start_forked
from tests.tiny import tiny_config
from ulysses_infer.config import ModelConfig
from ulysses_infer.model.model import ModelBuilder
from ulysses_infer.parallel.layout import Layout, Mode

MIB = 1 << 20
SLACK = 24 * MIB  # allocator, threads, module tree


def anonymous():
    """Bytes that this process holds for itself."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["RssAnon"].split()[0]) * 1024


def measure(pipe, folder, tp, shard, dtype):
    """In a process of its own: the weights' bytes, and how much its memory grows while they are loaded."""
    settings = ModelConfig(path=folder, dtype=dtype)
    plan = ModelBuilder.from_folder(Path(folder), settings, Layout(Mode(1, tp)), shard, torch.device("cpu"))
    seen, done = [anonymous()], threading.Event()

    def watch():
        while not done.wait(0.001):
            seen.append(anonymous())

    thread = threading.Thread(target=watch)
    thread.start()
    model = plan.load()
    done.set()
    thread.join()
    sum(float(parameter.flatten()[0]) for parameter in model.module.parameters())
    pipe.send({"grown": max(seen) - seen[0], "weights": model.weight_bytes})


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """About 200 MB of float32 weights; the largest tensor has 16 MiB."""
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("large")
    config = tiny_config(hidden_size=1024, intermediate_size=4096, num_hidden_layers=3)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.to_empty(device="cpu").save_pretrained(folder)
    return folder


def load(folder, tp, shard, dtype):
    ours, theirs = multiprocessing.Pipe()
    process = start_forked(measure, theirs, str(folder), tp, shard, dtype)
    theirs.close()
    try:
        return ours.recv()
    finally:
        process.join()
        ours.close()


@pytest.mark.parametrize("tp", [pytest.param(1, marks=pytest.mark.thorough), 2])
def test_weights_in_the_checkpoints_dtype_stay_in_its_file(checkpoint, tp):
    """On a CPU they are mapped pages, which the ranks of a host share and the system can drop."""
    measured = load(checkpoint, tp, tp - 1, "float32")
    assert measured["weights"] > 170 * MIB / tp
    assert measured["grown"] < SLACK


@pytest.mark.parametrize("tp", [pytest.param(1, marks=pytest.mark.thorough), 2])
def test_converted_weights_are_never_held_twice(checkpoint, tp):
    measured = load(checkpoint, tp, tp - 1, "bfloat16")
    assert 85 * MIB / tp < measured["weights"] < 90 * MIB / tp
    assert measured["weights"] * 0.95 < measured["grown"] < measured["weights"] + 16 * MIB + SLACK
