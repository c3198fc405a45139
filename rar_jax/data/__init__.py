"""Image sources, the token store and the loader. Knows arrays, not models."""
