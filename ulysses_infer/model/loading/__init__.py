"""Checkpoints and models in memory as sources of weights."""
