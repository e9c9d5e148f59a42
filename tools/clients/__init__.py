"""Checks of a running server with other projects' clients, one program per client.

These programs run in the client's own environment: they import the standard library and the client, nothing of ours.
"""
