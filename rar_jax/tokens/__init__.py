"""Stored tokens: tokenize images into a store, open, verify, import and export it."""
