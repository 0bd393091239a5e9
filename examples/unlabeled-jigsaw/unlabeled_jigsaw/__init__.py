"""Jigsaw puzzles as a pretext task of unlabeled."""
