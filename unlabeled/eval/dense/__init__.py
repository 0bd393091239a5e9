"""What a network sees in single places of an image: maps, attention, segmentation, objects."""
