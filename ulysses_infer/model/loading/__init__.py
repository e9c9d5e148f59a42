"""Sources of weights: checkpoints, models in memory, training engines."""
