"""Masked image modeling: part of an image is masked and predicted from the rest."""
