"""Silences the log chatter of libraries; warnings and errors still appear."""

from __future__ import annotations

import logging
import os
import sys

LIBRARY_SETTINGS = {
    "TRANSFORMERS_VERBOSITY": "error",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    "TOKENIZERS_PARALLELISM": "false",  # otherwise tokenizers warns when a process is started
    "TORCH_CPP_LOG_LEVEL": "ERROR",  # process groups log every connection that they retry
    "GLOG_minloglevel": "2",
}


def quiet_libraries(rank: int) -> None:
    """Set environment variables that libraries read at import; call it before. The user's own settings are kept.

    On other ranks than 0 only errors are shown, because the rest would repeat rank 0's output.
    """
    for name, value in LIBRARY_SETTINGS.items():
        os.environ.setdefault(name, value)
    if rank > 0:
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


def set_up_logging(level: str, rank: int) -> None:
    """Log to standard error: from `level` on rank 0; on other ranks only errors, with their rank."""
    name = "" if rank == 0 else f"[rank {rank}] "
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter(f"{name}%(levelname)s: %(message)s"))
    handler.setLevel(level.upper() if rank == 0 else "ERROR")
    logger = logging.getLogger("ulysses_infer")
    logger.handlers[:] = [handler]
    logger.propagate = False
    logger.setLevel(level.upper())
