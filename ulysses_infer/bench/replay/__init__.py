"""`bench replay`: sends a trace of production traffic to a server, at its own pace or scaled."""
