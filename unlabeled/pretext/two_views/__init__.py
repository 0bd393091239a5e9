"""Tasks that compare the features of two views of an image (joint embedding): SimCLR, BYOL, VICReg."""
