"""Randomness as a function of where it is used, so that a resumed run needs no generator state.

Every draw of a run comes from a generator seeded by (run seed, purpose, step or epoch, rank or image): the weights,
each epoch's order, each image's augmentation, each micro-step's masks and dropout.
"""

from __future__ import annotations

import hashlib
import struct


def derive(*parts: int | str) -> int:
    """A 63-bit seed from `parts`; different parts give independent seeds (BLAKE2b of their bytes)."""
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        digest.update(struct.pack("<q", part) if isinstance(part, int) else part.encode() + b"\0")
    return int.from_bytes(digest.digest(), "little") >> 1
