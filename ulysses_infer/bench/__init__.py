"""Benchmarks: of the engine itself, of servers by load and by trace, and of ways to use the same ranks."""
