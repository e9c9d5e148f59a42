"""Reinforcement learning: the engine as the rollout engine of training libraries."""
