"""Images in: sources (where images come from), decoding, and the loader that feeds a task's views."""
