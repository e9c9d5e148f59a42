"""The vocabulary head and the sampler."""
