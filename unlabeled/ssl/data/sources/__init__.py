"""Built-in data sources, one per file, and what they share."""
