"""transformers' models, adapted to run in any mode."""
