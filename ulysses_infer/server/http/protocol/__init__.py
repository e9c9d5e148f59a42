"""The wire format as pydantic types."""
