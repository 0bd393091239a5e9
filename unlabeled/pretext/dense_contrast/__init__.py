"""Pixels that show the same spot of an image in two views are alike."""
