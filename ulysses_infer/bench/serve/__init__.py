"""`bench serve`: load on a server that speaks OpenAI's format, from one process without torch, and what came of it."""
