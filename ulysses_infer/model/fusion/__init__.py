"""Fusion passes over a loaded model; each fused module is tested for equivalence at load time."""
