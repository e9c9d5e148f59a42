"""The paged KV cache: tensors, block allocation, prefix caching, memory budget."""
