"""The kernel ``M = J J^T`` and its derivative: products, dense matrices, solvers."""
