"""`bench compare`: the same work under data, tensor, sequence and shift parallelism, and a report of it."""
