"""Triton kernels; imported only by dwm_fast.ops."""
