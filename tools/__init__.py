"""Command-line tools for users of a checkout, run as modules: `python -m tools.NAME`."""
