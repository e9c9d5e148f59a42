"""Offline benchmarks: the modes of one engine, and a single rank, compared on one checkpoint in one run."""
