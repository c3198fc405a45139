"""The layout of a work directory, on a disk or in a bucket, and the check that it belongs to this run.

config.json                     the resolved experiment, and the version of the format
checkpoints/<stage>/            stages: tokenizer, classifier, generator
tokens/<split>/                 token stores: train, heldout
metrics.jsonl, ledger.jsonl, tensorboard/<stage>/, wandb/, wandb.json, *.png, result.json
grids/<stage>/                  samples and reconstructions during training
dump/<stage>/                   state and batch of a training that stopped because bad updates persisted
.lock.json                      the process that writes here

In a bucket every process writes its part of checkpoints and tokens directly. Files that grow row by row are written to
a temporary folder, which process 0 copies to the bucket before each step is committed and at the end.
"""

from __future__ import annotations

import atexit
import json
import pathlib
import shutil
import tempfile
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from rar_jax.config import differences
from rar_jax.errors import ConfigError
from rar_jax.parallel.processes import from_main, is_main
from rar_jax.parallel.storage import check_shared
from rar_jax.runs.bucket import BucketPath, Path, list_files, make_path
from rar_jax.runs.manifest import write_json

FORMAT = "0.2"  # the version of rar_jax that introduced this layout
# Sections that may change when a run is resumed: mesh, sampling, evaluation, logging.
FREE_SECTIONS = ("mesh", "sampling", "evaluate", "wandb")
DIRECT = ("checkpoints/", "tokens/", "dump/", "evaluation/chunks/", ".")  # what is written to a bucket directly
REMOTE = ".remote"  # in the temporary folder of a directory in a bucket: its URL, so that the folder can be opened, too
MAX_SHOWN = 12  # differences of two configs in one message


class Workdir:
    """Paths of one work directory.

    root: the directory itself.
    path: the folder of its small files: the same, or for a bucket a temporary folder of this process.
    """

    def __init__(self, path: str | pathlib.Path | BucketPath) -> None:
        """Raises: ConfigError for an invalid bucket URL."""
        given = make_path(path)
        self.path: pathlib.Path = _make_local(given) if isinstance(given, BucketPath) else given
        remote = self.path / REMOTE
        self.root: Path = make_path(remote.read_text()) if remote.is_file() else self.path
        self.config: pathlib.Path = self.path / "config.json"
        self.result: pathlib.Path = self.path / "result.json"
        self._copied: dict[str, tuple[int, int]] = {}  # sizes and times of files that are in the bucket
        self._copying = threading.Lock()

    def checkpoints(self, stage: str) -> Path:
        """Return the folder of a stage's checkpoints."""
        return self.root / "checkpoints" / stage

    def tokens(self, split: str) -> Path:
        """Return the folder of a split's token store."""
        return self.root / "tokens" / split

    @property
    def chunks(self) -> Path | None:
        """The folder of finished chunks of evaluations in a bucket; None on a disk: they are beside the results."""
        return self.root / "evaluation" / "chunks" if isinstance(self.root, BucketPath) else None

    # ---- small files of a directory in a bucket

    def fetch(self) -> Workdir:
        """Copy the small files from the bucket, if there is one, to this process's folder."""
        if isinstance(root := self.root, BucketPath):
            names = [name for name in root.names() if not name.startswith(DIRECT)]
            with ThreadPoolExecutor(8) as pool:
                for name, content in zip(names, pool.map(lambda name: (root / name).read_bytes(), names), strict=True):
                    file = self.path / name
                    file.parent.mkdir(parents=True, exist_ok=True)
                    file.write_bytes(content)
                    self._copied[name] = _signature(file)
        return self

    def send(self) -> None:
        """Copy changed files of process 0 to the bucket, if there is one, results (JSON) last."""
        if not isinstance(root := self.root, BucketPath) or not is_main():
            return
        with self._copying:
            names = [name for name in list_files(self.path) if not name.startswith(".") and not name.endswith(".tmp")]
            for name in sorted(names, key=lambda name: (name.endswith(".json"), name)):
                signature = _signature(self.path / name)
                if self._copied.get(name) != signature:
                    (root / name).write_bytes((self.path / name).read_bytes())
                    self._copied[name] = signature
            for name in self._copied.keys() - names:
                (root / name).unlink(missing_ok=True)
                del self._copied[name]

    # ---- whose it is

    def claim(self, config: dict[str, Any], fill_defaults: Callable[[dict[str, Any]], dict[str, Any]] = dict) -> None:
        """Make the directory this experiment's, or check that it is. It can change hands until something is made there.

        Args:
          fill_defaults: completes the config of an earlier start by keys that were added since.

        Raises: ConfigError with the differences if it belongs to another experiment; what `make` raises.
        """
        self.make()
        from_main(lambda: self._claim(json.loads(json.dumps(config)), fill_defaults))
        if not is_main():
            self.fetch()

    def make(self) -> None:
        """Create the folder. All processes call it.

        Raises: ConfigError if that fails; StorageError if the processes do not share the folder.
        """
        if isinstance(self.root, pathlib.Path):
            from_main(self._make)
            check_shared(self.path)

    def _make(self) -> None:
        if self.path.exists() and not self.path.is_dir():
            raise ConfigError(f"{self.path} is not a folder: choose another --workdir")
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"{self.path} cannot be made ({error.strerror}): choose another --workdir") from None

    def _claim(self, config: dict[str, Any], fill_defaults: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
        self.fetch()
        made = sorted(
            p.name for p in self.path.iterdir() if not p.name.startswith((".", "config.json", "ledger.jsonl"))
        )
        if made and not self.config.exists():
            raise ConfigError(f"{self.root} has no config.json but holds {made[0]}: choose another --workdir")
        if made:
            theirs = json.loads(json.dumps(fill_defaults(self.read_config())))
            lines = differences(*({k: v for k, v in c.items() if k not in FREE_SECTIONS} for c in (theirs, config)))
            if lines:
                more = f"; and {len(lines) - MAX_SHOWN} more" if len(lines) > MAX_SHOWN else ""
                raise ConfigError(
                    f"{self.root} belongs to a run of '{theirs.get('name')}' with another config. Choose another "
                    f"--workdir, or undo: {'; '.join(lines[:MAX_SHOWN])}{more}"
                )
        self.write_config(config)
        self.send()

    def write_config(self, config: dict[str, Any]) -> None:
        """Write config.json."""
        write_json(self.config, {"version": FORMAT, **config})

    def read_config(self) -> dict[str, Any]:
        """Return the resolved experiment. Raises: ConfigError if there is none, it is damaged or of another version."""
        try:
            config = json.loads(self.config.read_text())
            version = config.pop("version", "0.1")
        except FileNotFoundError:
            raise ConfigError(
                f"{self.root} is not a work directory: it has no config.json. Give the --workdir of rar-jax run"
            ) from None
        except (ValueError, AttributeError, TypeError) as error:
            raise ConfigError(f"{self.config} is damaged ({error}): restore it or choose another --workdir") from None
        if version != FORMAT:
            raise ConfigError(
                f"{self.root} was made by rar_jax {version}, and this version reads {FORMAT}: choose another "
                f"--workdir, or install rar_jax {version}"
            )
        return config


def _make_local(root: BucketPath) -> pathlib.Path:
    folder = pathlib.Path(tempfile.mkdtemp(prefix="rar_jax-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    (folder / REMOTE).write_text(str(root))
    return folder


def _signature(path: pathlib.Path) -> tuple[int, int]:
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns
