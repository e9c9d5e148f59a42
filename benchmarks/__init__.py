"""Measurements of the engine, each a module to run: `python -m benchmarks.NAME`."""
