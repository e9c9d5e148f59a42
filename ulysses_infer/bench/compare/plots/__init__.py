"""Plots of a comparison; each function returns a matplotlib figure."""
