"""Elastic networks: one network whose prefixes in width and depth are networks of their own (POA, arXiv 2408.01031)."""

from unlabeled.ssl.backbones.elastic.config import ElasticConfig
from unlabeled.ssl.backbones.elastic.families import elastic_missing_reason
from unlabeled.ssl.backbones.elastic.network import Elastic
from unlabeled.ssl.backbones.elastic.sizes import SubSize

__all__ = ["Elastic", "ElasticConfig", "SubSize", "elastic_missing_reason"]
