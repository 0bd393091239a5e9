"""The implementation of each command, in one file or folder, shared by the command line and the Python functions."""
