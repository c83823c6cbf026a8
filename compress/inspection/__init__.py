"""Inspection of a network before anything is changed."""
