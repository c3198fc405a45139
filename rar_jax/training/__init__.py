"""Optimizer, train state, checkpoints and reports. Knows pytrees and a loss function, not models."""
