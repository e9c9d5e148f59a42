"""The OpenAI-compatible server: an HTTP process, and rank 0's side of it."""
