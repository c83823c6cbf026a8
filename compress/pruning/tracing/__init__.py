"""Tracing of channels through a forward pass: which channels of a network's parameters are the same channel."""
