"""The engine against its peers on the same checkpoints and processors, in one run: `python -m benchmarks.compare_peers`."""
