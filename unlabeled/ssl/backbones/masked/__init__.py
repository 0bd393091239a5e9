"""Backbones on part of an image: transformers on some of their tokens, ConvNets on some of their positions."""
