"""One file a verb of the command line, each read from top to bottom like a page."""
