"""``unlabeled matrix``: tries every task on every timm architecture, and renders the results as a page."""
