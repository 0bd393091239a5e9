"""Images in: sources (where pictures come from), decoding, and the loader that feeds a task's views."""
