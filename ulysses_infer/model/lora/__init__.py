"""LoRA adapters: loaded at startup, selected per request, applied in every mode."""
