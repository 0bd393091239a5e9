"""Supervised fine-tuning: how good a classifier the pretrained weights become, beside one that starts from nothing."""
