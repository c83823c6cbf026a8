"""Costs of a network: MACs and weights, counted from torch and from ONNX; latency tables."""
