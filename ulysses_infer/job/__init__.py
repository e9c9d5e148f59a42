"""Ranks and processes of a job: start, supervision, end."""
