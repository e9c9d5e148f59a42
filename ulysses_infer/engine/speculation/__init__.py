"""Speculative decoding: what is drafted for a step to verify, and how much of it."""
