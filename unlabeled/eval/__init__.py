"""Evidence out: features, evaluators, baselines, the report."""
