"""One file is one tokenizer: a module here is found by its file name (`config.tokenizer.name`).

What each file offers is listed in docs/contracts.md and tested by tests/contracts/ as soon as it exists.
"""
