"""`bench serve`: a load generator for servers with the OpenAI API, in one process without torch."""
