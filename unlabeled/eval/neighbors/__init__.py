"""The most similar rows among many: exact, proven from 8-bit products, or by an index."""
