"""Measurements of this package against other ways to compute the same."""
