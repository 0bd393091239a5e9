"""Nearest-neighbor search by cosine: exact, exact by way of 8-bit products, or with an approximate index."""
