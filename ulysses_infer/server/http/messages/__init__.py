"""Anthropic's API: its requests as chat requests, outputs as blocks."""
