"""Planning: the layouts of a model on a node, simulated with the engine's own scheduler and policies."""
