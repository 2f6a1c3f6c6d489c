"""Kernels whose single weights are stored in compressed sparse rows (CSR)."""
