"""`bench replay`: sends a trace of production traffic to a server, at its original rate or scaled."""
