"""Pretext tasks, one file each; `unlabeled.pretext.registry` finds them by name."""
