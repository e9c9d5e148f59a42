"""Quantized checkpoints: weights stay as stored, in one base slice that every mode views."""
