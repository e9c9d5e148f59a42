"""Head shards, process groups, and the collectives of each mode."""
