"""Networks of our own, registered with timm when this package is imported."""

from unlabeled.ssl.networks.nin import NetworkInNetwork, nin_cifar

__all__ = ["NetworkInNetwork", "nin_cifar"]
