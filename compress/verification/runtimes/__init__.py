"""Where a network can be run: one file a runtime."""
