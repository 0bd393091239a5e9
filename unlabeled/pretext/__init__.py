"""Pretext tasks: one file each, found through `unlabeled.pretext.registry`."""
