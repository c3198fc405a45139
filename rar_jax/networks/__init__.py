"""Flax Linen modules and nothing else: no training, no data, no files."""
