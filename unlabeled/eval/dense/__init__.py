"""Dense features, one vector for each position of an image: maps, attention, segmentation, object discovery."""
