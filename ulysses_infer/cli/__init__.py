"""The command line: what `ulysses-infer` and `launch.py` do with their arguments."""
