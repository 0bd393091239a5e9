"""Feature extraction, the feature cache, and the re-estimation of batch-norm statistics."""
