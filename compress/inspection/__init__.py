"""What can be done to a network, before anything is done to it."""
