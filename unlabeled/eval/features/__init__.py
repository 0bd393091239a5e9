"""From images to features: extraction, the cache of what was extracted, and batch-norm statistics estimated anew."""
