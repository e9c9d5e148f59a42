"""Layers whose view of the weights follows the mode of a step."""
