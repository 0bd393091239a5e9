"""What a network sees in single places of a picture: maps, attention, segmentation, objects."""
