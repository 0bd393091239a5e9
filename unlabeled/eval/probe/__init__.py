"""Linear classifiers on frozen features: what they read, and how many are trained at once."""
