"""Print what a source of images, a token store or a work directory holds."""
