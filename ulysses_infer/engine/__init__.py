"""The engine of rank 0: scheduling, policies, requests, results."""
