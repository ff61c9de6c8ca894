"""Exact operations on matrices and masks: sparsity targets, bits, sums, compiled loops. Imports only torch."""
