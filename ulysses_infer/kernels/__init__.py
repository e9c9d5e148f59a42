"""Triton kernels for GPUs. Modules that import triton are imported only where its kernels run."""
