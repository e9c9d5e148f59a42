"""Fusion passes over a loaded model; every fused form is proved equal when the model is loaded."""
