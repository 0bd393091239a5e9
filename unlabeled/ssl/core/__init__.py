"""The foundation: errors, seeds, signals, files, processes and CPU kernels. Nothing in here knows about images."""
