"""One file per verb of the command line, imported by nothing else in the package."""
