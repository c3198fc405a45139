"""Mesh, sharding rules and processes: where arrays live."""
