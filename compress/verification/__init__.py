"""Verification of the exported file, measured on the file in its runtime."""
