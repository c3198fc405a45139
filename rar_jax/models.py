"""Models are found by name: one file of generators/ or tokenizers/ is one model."""

from __future__ import annotations
