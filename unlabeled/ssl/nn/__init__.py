"""Building blocks of models, and optimizers that timm does not have."""
