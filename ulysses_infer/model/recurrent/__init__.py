"""Recurrent layers: transformers' own forward, run by each rank on its heads and channels of every token."""
