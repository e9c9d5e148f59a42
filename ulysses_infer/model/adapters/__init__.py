"""Adapts families whose attention does not go through transformers' attention interface, or is laid out differently."""
