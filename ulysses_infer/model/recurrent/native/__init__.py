"""Forms in C of what lies between the projections of recurrent layers, for CPUs."""
