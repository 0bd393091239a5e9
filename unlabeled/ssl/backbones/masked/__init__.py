"""Networks that see a part of the image: transformers on some of their tokens, ConvNets on some of their positions."""
