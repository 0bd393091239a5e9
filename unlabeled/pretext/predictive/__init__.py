"""Tasks that predict labels made from the image itself: its rotation, or the position of a patch."""
