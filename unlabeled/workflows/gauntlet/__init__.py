"""Many backbones on many data sets, each judged by the same evaluators: ``unlabeled gauntlet``."""
