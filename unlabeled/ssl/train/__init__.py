"""A training run: loop, assembly, optimizer, schedule, run folder, checkpoints and metrics."""
