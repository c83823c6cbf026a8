"""Conversion of exported files into the formats of other runtimes."""
