"""One rank's share of a step."""
