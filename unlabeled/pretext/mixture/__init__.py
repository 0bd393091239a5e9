"""Mixtures: several pretext tasks that train one backbone."""
