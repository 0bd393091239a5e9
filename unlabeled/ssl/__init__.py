"""What every pretext task shares: backbones, data, configuration, the engine, checkpoints.

Import from the modules themselves (``from unlabeled.ssl.engine import ...``); never ``from unlabeled import ssl``.
"""
