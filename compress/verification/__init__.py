"""Is the exported file what it should be? Measured on the file, in its runtime."""
