"""What stands between a shell and the engine: arguments, signals, the screen."""
