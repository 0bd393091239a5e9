"""The ground floor: errors, seeds, signals, files, processes and processor kernels. It knows nothing of images."""
