"""LoRA adapters: loaded at start, chosen per request, applied in every mode."""
