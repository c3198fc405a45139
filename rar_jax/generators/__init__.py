"""One file is one generator: a module here is found by its file name (`config.generator.name`).

What each file offers is listed in docs/contracts.md and tested by tests/contracts/ as soon as it exists.
"""
