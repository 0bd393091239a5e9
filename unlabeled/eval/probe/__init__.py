"""Linear classifiers on frozen features: their inputs, their batches, and the training of many at once."""
