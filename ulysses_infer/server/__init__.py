"""The OpenAI-compatible HTTP server: a process beside rank 0, and rank 0's side of it."""
