"""What of a transformers model is replaced, and by what."""
