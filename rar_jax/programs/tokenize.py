"""Turn images into token stores; check, import and export stores."""

from __future__ import annotations

import pathlib

from rar_jax.config import require
from rar_jax.data.image_source import Split
from rar_jax.errors import ConfigError
from rar_jax.experiment import Experiment, fill_defaults
from rar_jax.parallel.mesh import make_mesh
from rar_jax.parallel.processes import is_main
from rar_jax.runs.session import open_session
from rar_jax.runs.workdir import Workdir
from rar_jax.tokens.tokenize import tokenize, tokenize_source
from rar_jax.tokens.verify import export_tokens, import_tokens, verify_tokens
from rar_jax.weights.loading import Reading


def make_tokens(
    experiment: Experiment | None,
    workdir: Workdir | None,
    *,
    source: str | None,
    verify: pathlib.Path | None,
    import_: pathlib.Path | None,
    export: pathlib.Path | None,
    weights: str | None,
    out: pathlib.Path | None,
    crops: str | None,
    split: Split,
    shard_records: int | None,
    batch_size: int,
    codebook_size: int | None,
    num_classes: int | None,
    reading: Reading,
    quiet: bool,
) -> None:
    """Do one of five things: tokenize a work directory's splits or a source; verify, import or export a store."""
    given = [x for x in (workdir, source, verify, import_, export) if x is not None]
    require(len(given) == 1, "give one of --workdir, --source, --verify, --import and --export")
    common = {"shard_records": shard_records, "quiet": quiet}
    require(shard_records is None or shard_records >= 1, f"--shard-records is {shard_records}: it must be at least 1")
    if workdir is not None:
        require(weights is None and out is None, "--workdir has its own tokenizer and stores: omit --weights and --out")
        if experiment is None:
            raise ConfigError("tokenize --workdir needs --config: the experiment of the directory")
        mesh = make_mesh(experiment.mesh)
        experiment.check_mesh(mesh)
        workdir.read_config()  # it must exist
        with open_session(workdir, "tokenize", lambda: workdir.claim(experiment.resolved(), fill_defaults)) as around:
            for each in ("train", "heldout"):
                tokenize(experiment, workdir, mesh, each, quiet=quiet)
                around.ledger.lap("tokenizing")
                around.ledger.row("tokenized", split=each)
    elif verify:
        if is_main():
            print(verify_tokens(verify, weights=weights, out=out, reading=reading, quiet=quiet))
    elif out is None:
        raise ConfigError("give --out: where to write the store or file")
    elif source:
        if experiment is None or weights is None:
            raise ConfigError("tokenize --source needs --config (what the images are) and --weights (the tokenizer)")
        how = {"crops": crops, "split": split, "batch_size": batch_size, "reading": reading, **common}
        tokenize_source(experiment, make_mesh(experiment.mesh), source=source, weights=weights, out=out, **how)
    elif is_main() and export:
        export_tokens(export, out, quiet=quiet)
    elif is_main() and import_:
        sizes = {"codebook_size": codebook_size, "num_classes": num_classes}
        import_tokens(import_, out, experiment=experiment, **sizes, **common)
