"""Compile an experiment for TPUs that are not attached."""
