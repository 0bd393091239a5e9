"""OBoW: a student that sees small parts of an image predicts which visual words its teacher finds in the whole.

Gidaris, Bursuc, Puy, Komodakis, Cord, Pérez, "OBoW: Online Bag-of-Visual-Words Generation for Self-Supervised
Learning", CVPR 2021, arXiv 2012.11552; repository github.com/valeoai/obow.

`task` the method in one page; `vocabulary` words, codes, bags and classifier weights made from words; `views` what
student and teacher see; `reference` the names in the authors' files. Legend on top of `unlabeled.ssl.task`:
K words, P places of a map, C channels of a level, D of the pooled features.
"""

from unlabeled.pretext.obow.task import OBoW, OBoWConfig

__all__ = ["OBoW", "OBoWConfig"]
