"""Signatures of the packages with kernels for recurrent layers, read from their source: recurrent_signatures.json.

`python -m tests.model.recurrent.recurrent_signatures` downloads the pinned releases and writes the file anew.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from tests.attention.signatures import Parameters, as_text, download, read

KEPT = Path(__file__).with_name("recurrent_signatures.json")
DELTA, KIMI = "fla/ops/gated_delta_rule", "fla/ops/kda"
SSM = "mamba_ssm/ops"
RELEASES = {
    "fla-core==0.6.0": {
        "chunk_gated_delta_rule": f"{DELTA}/chunk.py",
        "fused_recurrent_gated_delta_rule": f"{DELTA}/fused_recurrent.py",
        "chunk_kda": f"{KIMI}/chunk.py",
        "fused_recurrent_kda": f"{KIMI}/fused_recurrent.py",
    },
    "causal-conv1d==1.7.0": dict.fromkeys(
        ("causal_conv1d_fn", "causal_conv1d_update"), "causal_conv1d/causal_conv1d_interface.py"
    ),
    "mamba-ssm==2.3.2.post1": {
        "selective_scan_fn": f"{SSM}/selective_scan_interface.py",
        "selective_state_update": f"{SSM}/triton/selective_state_update.py",
        "mamba_inner_fn": f"{SSM}/selective_scan_interface.py",
        "mamba_split_conv1d_scan_combined": f"{SSM}/triton/ssd_combined.py",
        "mamba_chunk_scan_combined": f"{SSM}/triton/ssd_combined.py",
    },
}
"""By release: the file of each function."""


def kept() -> dict[str, dict[str, Parameters]]:
    """The signatures of recurrent_signatures.json: by release and function."""
    found: dict[str, dict[str, Parameters]] = json.loads(KEPT.read_text())
    return found


def main() -> None:
    """Write recurrent_signatures.json."""
    os.environ |= {"CAUSAL_CONV1D_SKIP_CUDA_BUILD": "TRUE", "MAMBA_SKIP_CUDA_BUILD": "TRUE"}
    KEPT.write_text(as_text({release: read(download(release), names) for release, names in RELEASES.items()}))


if __name__ == "__main__":
    main()
