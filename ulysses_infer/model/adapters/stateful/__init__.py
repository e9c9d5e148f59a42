"""Adapters of families whose blocks keep states of their own, or have recurrent layers beside attention."""
