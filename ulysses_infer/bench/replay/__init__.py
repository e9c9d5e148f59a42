"""`bench replay`: a trace of production traffic, sent to a server as it came, or to scale."""
