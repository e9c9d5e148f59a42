"""`bench compare`: the same workloads under data, tensor, sequence and shift parallelism, with a report."""
