"""Models that transformers lacks, defined on its classes and registered with its `Auto` classes."""
