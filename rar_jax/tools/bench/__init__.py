"""Time parts of an experiment against what the machine can do."""
