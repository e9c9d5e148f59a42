"""The version of the package, also for setuptools."""

__version__ = "0.1.0"
