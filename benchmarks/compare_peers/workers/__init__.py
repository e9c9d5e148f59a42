"""One module per engine, run as its own process in that engine's virtual environment."""
