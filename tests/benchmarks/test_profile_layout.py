"""The measurement of one rank alone: every mode and load is run, and the figures say how they were obtained."""

import json
import runpy
import sys

import pytest

from tests.ranks import start_forked

CONFIG = {
    "model_type": "llama",
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 6,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "vocab_size": 256,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
}


def measure(arguments):
    """What the forked process does."""
    sys.argv = ["profile_layout", *arguments]
    runpy.run_module("benchmarks.profile_layout", run_name="__main__")


@pytest.mark.thorough
@pytest.mark.parametrize("weights", [[], ["--fp8"]])
def test_one_rank_of_eight_is_measured_in_every_mode(tmp_path, weights):
    (tmp_path / "tiny.json").write_text(json.dumps(CONFIG))
    output = tmp_path / "out.json"
    measured = start_forked(
        measure,
        [
            str(tmp_path / "tiny.json"),
            "--rank",
            "3",
            "--layers",
            "2",
            "--decodes",
            "1",
            "3",
            "--prompts",
            "17",
            "--context",
            "20",
            "--repeats",
            "1",
            "--block-size",
            "16",
            "--device",
            "cpu",
            "--output",
            str(output),
            *weights,
        ],
    )
    measured.join(240)
    assert measured.exitcode == 0
    saved = json.loads(output.read_text())
    assert (saved["model"], saved["base"], saved["rank"], saved["layers"]) == ("tiny", [8, 1], 3, 2)
    assert "random weights" in saved["how"]
    assert saved["device"].startswith("CPU")
    assert saved["weights"].startswith("fp8" if weights else "bfloat16")
    seen = {(step["mode"], step["requests"], step["tokens"], step["context"]) for step in saved["steps"]}
    loads = [(1, 1, 20), (3, 1, 20), (1, 17, 0)]
    assert seen == {(mode, *load) for mode in ("sp8xtp1", "sp4xtp2", "sp2xtp4", "sp1xtp8") for load in loads}
    assert all(step["seconds"] > 0 for step in saved["steps"])
