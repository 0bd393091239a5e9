"""Our own architectures, registered with timm when this package is imported."""

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
    "register_networks",
]


def register_networks() -> None:
    """Makes timm know our own architectures (``nin_cifar``, ``convmae_small``, ...).

    You need it only in Python code that uses just timm: ``timm.create_model("nin_cifar", checkpoint_path=...)``.
    """
    # a no-op: importing this package has registered them
