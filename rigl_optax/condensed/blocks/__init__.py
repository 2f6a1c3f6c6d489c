"""Kernels whose stored blocks are multiplied: products, convolutions, recurrences."""
