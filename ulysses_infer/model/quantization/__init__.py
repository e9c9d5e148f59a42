"""Quantised checkpoints: weights stay in memory as they are stored, in the one base slice that every mode views."""
