"""Low-rank adapters beside the served weights: read at start, chosen by each request, right in every mode."""
