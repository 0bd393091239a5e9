"""Networks of our own, registered with timm when this package is imported."""

from unlabeled.ssl.backbones.networks.context import ContextNet, contextnet
from unlabeled.ssl.backbones.networks.convmae import ConvViT, convmae_base, convmae_large, convmae_small
from unlabeled.ssl.backbones.networks.nin import NetworkInNetwork, nin_cifar

__all__ = [
    "ContextNet",
    "ConvViT",
    "NetworkInNetwork",
    "contextnet",
    "convmae_base",
    "convmae_large",
    "convmae_small",
    "nin_cifar",
]
