"""ConvNets on masked images: masked places do not exist, rather than being zero (see `rules`)."""

from unlabeled.ssl.backbones.masked.sparse.convert import SparseEncoder, convert, sparse_convs_missing_reason
from unlabeled.ssl.backbones.masked.sparse.masked_map import MaskedMap

__all__ = ["MaskedMap", "SparseEncoder", "convert", "sparse_convs_missing_reason"]
