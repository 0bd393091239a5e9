"""OBoW: from small views of an image, a student predicts which visual words its teacher finds in the full image.

Gidaris, Bursuc, Puy, Komodakis, Cord, Pérez, "OBoW: Online Bag-of-Visual-Words Generation for Self-Supervised
Learning", CVPR 2021, arXiv 2012.11552; code of the authors: github.com/valeoai/obow.

Modules: `task` (the method), `vocabulary` (visual words, codes, bags, and the classifier that is generated from words),
`views` (inputs of student and teacher), `drawing`, `reference` (names in the authors' files). Shapes in addition to
those of `unlabeled.ssl.task`: K words, P positions of a feature map, C channels of a level, D pooled features.
"""

from unlabeled.pretext.obow.task import OBoW, OBoWConfig

__all__ = ["OBoW", "OBoWConfig"]
