"""Replacing kernels by products of smaller ones: factors, ranks, surgery."""
