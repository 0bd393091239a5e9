"""Labels from the image itself: which way it was turned, where a patch belongs."""
