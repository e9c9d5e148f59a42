"""Adapters of families whose attention selects keys, or compresses them from several tokens."""
