"""Networks: any timm model behind one surface, its masked and elastic forms, and weights on disk."""
