"""Ranks and the processes around them: started, watched, ended."""
