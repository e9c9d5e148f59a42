"""The engine and its peers on the same checkpoints and processors: `python -m benchmarks.compare_peers`."""
