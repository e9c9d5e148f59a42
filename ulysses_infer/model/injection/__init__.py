"""Replaces parts of a transformers model by layers that follow the mode."""
