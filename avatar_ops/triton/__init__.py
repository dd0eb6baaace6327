"""Triton kernels, a module per op. `avatar_ops` imports such a module at the op's first call on a GPU."""
