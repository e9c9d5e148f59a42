"""Benchmarks of the engine, of servers under load and with traces, and of ways to use the same ranks."""
