"""Building blocks of networks, and optimizers of our own."""
