"""One file is one tokenizer, found by its name (`config.tokenizer.name`); docs/contracts.md lists what it offers."""
