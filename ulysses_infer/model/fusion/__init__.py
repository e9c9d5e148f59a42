"""Passes over an injected model that compute together what transformers computes apart, each proved equal at load."""
