"""The checks of `tools/gpu_acceptance.py`, by subject."""
