"""`python logged.py FILE VERB ...`: the command, which also writes the digest of every batch that it trains on into a file."""

import itertools
import sys
from collections.abc import Iterator
from typing import Any

from digests import batch_digest

from rar_jax.cli import main
from rar_jax.training import loop as train

_batches = train.batches


def _logged(source: Any, *, start_step: int, **rest: Any) -> Iterator[Any]:
    for step, batch in zip(itertools.count(start_step), _batches(source, start_step=start_step, **rest), strict=False):
        width = batch["tokens"].shape[1] if "tokens" in batch else 0
        with open(sys.argv[1], "a") as file:
            file.write(f"{step} {width} {batch_digest(batch)}\n")
        yield batch


if __name__ == "__main__":
    train.batches = _logged
    sys.exit(main(sys.argv[2:]))
