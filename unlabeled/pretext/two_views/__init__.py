"""Two views of an image are alike, views of others are not, or features stay spread out."""
