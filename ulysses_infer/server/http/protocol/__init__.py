"""What goes over the wire, as pydantic types: they check requests and describe everything in /openapi.json."""
