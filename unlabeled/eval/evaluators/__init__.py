"""The evaluators, one file each; `unlabeled.eval.registry` lists them."""
