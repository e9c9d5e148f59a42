"""The layers that follow the mode of a step."""
