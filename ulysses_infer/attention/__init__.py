"""Attention backends: the queries of a step against the paged KV cache."""
