"""One module for each engine, run as a process of its own in that engine's virtual environment."""
