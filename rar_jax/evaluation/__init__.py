"""The scoring loop: samples or sets of images to features to numbers, resumable."""
