"""Parts of `unlabeled` in a package of one's own."""
