"""Steps that are recorded on a CPU or captured on a GPU, and replayed."""
