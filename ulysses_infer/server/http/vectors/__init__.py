"""Vectors of prompts, and scores of pairs of texts: requests that compute prompts only."""
