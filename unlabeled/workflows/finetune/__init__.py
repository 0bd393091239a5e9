"""``unlabeled finetune``: fine-tunes pretrained weights as a classifier, and compares with training from scratch."""
