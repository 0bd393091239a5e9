"""Seeds derived from where they are used, so that a resumed run needs no generator state.

Every generator of a run is seeded from (run seed, purpose, step or epoch, rank or image): for the weights, the order of
each epoch, the augmentation of each image, and the masks and dropout of each micro-step.
"""

from __future__ import annotations

import hashlib
import struct


def derive(*keys: int | str) -> int:
    """A 63-bit seed from `keys`; different keys give independent seeds (BLAKE2b of their bytes)."""
    # not hash(): that of a string differs in each process. The strings at the calls must never change: new names would
    # be new seeds, and a run would not resume as it began
    digest = hashlib.blake2b(digest_size=8)
    for key in keys:
        # the terminator keeps ("ab", "c") apart from ("a", "bc")
        digest.update(struct.pack("<q", key) if isinstance(key, int) else key.encode() + b"\0")
    return int.from_bytes(digest.digest(), "little") >> 1  # non-negative as a signed 64-bit integer
