"""Commands for users of a checkout, each a module to run: `python -m tools.NAME`."""
