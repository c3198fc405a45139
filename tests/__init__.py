"""The tests; a package, so that `python -m tests.golden` runs from the project folder."""
