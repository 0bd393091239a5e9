"""Pieces that several pretext tasks share: patches, masks, positions, decoders."""
