"""``unlabeled gauntlet``: evaluates many backbones on many datasets with the same evaluators."""
