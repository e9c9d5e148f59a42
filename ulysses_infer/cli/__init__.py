"""The command line: `ulysses-infer` and `launch.py`."""
