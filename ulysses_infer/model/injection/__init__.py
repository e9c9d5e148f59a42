"""Replaces modules of a transformers model by mode-aware ones."""
