"""Kernels in C for what torch does slowly on a CPU: built on first use, kept, and never required."""
