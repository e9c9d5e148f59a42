"""Heads that draft tokens from the hidden states of the served model: multi-token prediction, and EAGLE-3."""
