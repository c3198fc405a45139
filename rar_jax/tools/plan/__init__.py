"""Compile an experiment for accelerators that are not here, and report memory, FLOPs and communication."""
