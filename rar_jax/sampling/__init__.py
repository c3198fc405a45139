"""From labels to images: the jitted sampler."""
