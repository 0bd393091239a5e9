"""What the commands do: a file or a folder each, called by the command line and by the Python functions alike."""
