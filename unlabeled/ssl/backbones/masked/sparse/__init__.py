"""ConvNets on masked pictures: masked places do not exist, rather than being zero (see `rules`)."""

from unlabeled.ssl.backbones.masked.sparse.convert import SparseEncoder, convert, lacks_sparse_convs
from unlabeled.ssl.backbones.masked.sparse.masked_map import MaskedMap

__all__ = ["MaskedMap", "SparseEncoder", "convert", "lacks_sparse_convs"]
