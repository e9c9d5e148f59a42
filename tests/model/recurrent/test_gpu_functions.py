"""Recurrent layers call the kernels of other packages on GPUs, and transformers' own form elsewhere."""

from __future__ import annotations

import json
import logging
import subprocess
import sys

import pytest
import torch

from tests.attention.signatures import UnavailableError, download, read
from tests.launcher import ROOT, environment
from tests.model.recurrent.recurrent_signatures import RELEASES, kept
from tests.native.recurrent_layers import SHAPES, make_layer
from ulysses_infer.kernels.launch import assume
from ulysses_infer.model.fusion.recurrent import warn_of_missing_packages

CONVOLUTION = {"1": ["causal_conv1d_update"], "5": ["causal_conv1d_fn"]}
CALLED = {
    "qwen3_next": {"1": "fused_recurrent_gated_delta_rule", "5": "chunk_gated_delta_rule"},
    "kimi_linear": {"1": "fused_recurrent_kda", "5": "chunk_kda"},
    "bamba": {"1": "selective_state_update", "5": "mamba_chunk_scan_combined"},
    "nemotron_h": {"1": "selective_state_update", "5": "mamba_chunk_scan_combined"},
    "jamba": {"1": "selective_state_update", "5": "selective_scan_fn"},
    "lfm2": {},
}
"""Besides the convolution, for one token and for several."""


@pytest.mark.thorough
def test_the_packages_are_called_on_gpus_with_their_own_signatures() -> None:
    command = [sys.executable, "-m", "tests.model.recurrent.with_packages", *CALLED]
    done = subprocess.run(
        command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    for kind, functions in CALLED.items():
        wanted = {length: sorted([*CONVOLUTION[length], *filter(None, [functions.get(length)])]) for length in "15"}
        assert found[kind]["called"] == wanted, kind
        assert found[kind]["error"] < 1e-4, kind
        assert not found[kind]["missing"]


def test_a_job_says_once_what_to_install(caplog: pytest.LogCaptureFixture) -> None:
    layers = [make_layer("bamba", torch.float32, SHAPES["bamba"], 2, shard) for shard in (0, 1)]
    logging.getLogger("ulysses_infer").propagate = True
    with assume("cpu", (9, 0)), caplog.at_level(logging.WARNING):
        for layer in layers:
            warn_of_missing_packages([layer], torch.device("cpu"))
    assert [record.message for record in caplog.records if record.name.startswith("ulysses_infer")] == [
        "BambaMixer run transformers' form in torch, which is correct but slow; for faster kernels install "
        "causal-conv1d, mamba-ssm"
    ]
    assert not [record for record in caplog.records if "falling back" in record.message], "transformers is silent"
    caplog.clear()
    warn_of_missing_packages(layers, torch.device("cpu"))
    assert not caplog.records, "there are no kernels for CPUs"


@pytest.mark.thorough
@pytest.mark.parametrize("release", RELEASES)
def test_the_signatures_are_those_of_the_release(release: str) -> None:
    try:
        archive = download(release)
    except UnavailableError as error:
        pytest.skip(str(error))
    assert json.loads(json.dumps(read(archive, RELEASES[release]))) == kept()[release]
