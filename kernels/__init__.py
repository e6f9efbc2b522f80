"""Triton kernels: one launch for a whole network. Imported only when an operation first needs them."""
