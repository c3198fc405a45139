"""One file is one generator, found by its name (`config.generator.name`); docs/contracts.md lists what it offers."""
