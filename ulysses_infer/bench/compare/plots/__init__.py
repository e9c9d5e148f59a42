"""Pictures of a comparison: each function here gives a matplotlib figure."""
