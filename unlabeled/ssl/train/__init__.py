"""A run: the loop, what it is built from, its optimizer and schedule, its folder, checkpoints and metrics."""
