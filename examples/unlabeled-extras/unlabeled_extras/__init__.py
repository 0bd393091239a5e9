"""Parts of `unlabeled` in a package of their own."""
