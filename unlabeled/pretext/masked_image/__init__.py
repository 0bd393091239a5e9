"""Masked image modeling: a part of the image is hidden and predicted from the rest."""
