"""Backbones: any timm model behind one interface, its masked and elastic forms, and weights on disk."""
