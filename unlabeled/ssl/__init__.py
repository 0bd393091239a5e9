"""What every pretext task shares: backbones, data, configuration, the engine, checkpoints.

Import from the modules themselves (``from unlabeled.ssl.train.loop import ...``); never ``from unlabeled import ssl``.
"""
