"""Dense contrast: features of two views agree at positions that show the same point of the image."""
