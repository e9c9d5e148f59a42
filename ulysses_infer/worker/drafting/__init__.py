"""Models that draft tokens: what every rank runs. What is drafted is decided on rank 0 (`engine/speculation/`)."""
