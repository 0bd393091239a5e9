"""Code that several pretext tasks share: views, positions, teachers, checkpoints, drawing."""
