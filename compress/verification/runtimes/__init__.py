"""Runtimes that can run a network: one module each."""
