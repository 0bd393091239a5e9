"""Evaluation of an encoder on labeled data: features, evaluators, baselines, and the results for the report."""
