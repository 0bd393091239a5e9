"""``unlabeled gauntlet``: evaluates many backbones on many data sets with the same evaluators."""
