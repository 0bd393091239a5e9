"""A student learns the assignments of a teacher that is its own moving average."""
