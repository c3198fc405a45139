"""The layout of a work directory, and the check that it belongs to this run.

config.json           the resolved experiment, and the version of the format
checkpoints/<stage>/  stages: tokenizer, classifier, generator
tokens/<split>/       token stores: train, heldout
metrics.jsonl, ledger.jsonl, tensorboard/<stage>/, wandb/, wandb.json, *.png, result.json
grids/<stage>/        samples and reconstructions as the training went on
dump/<stage>/         what a training that gave up leaves for a person
.lease.json           who writes here now
"""

from __future__ import annotations

import json
import pathlib
from collections.abc import Callable
from typing import Any

from rar_jax.config import differences, shortened
from rar_jax.errors import ConfigError
from rar_jax.parallel.processes import from_main
from rar_jax.parallel.storage import check_shared
from rar_jax.runs.manifest import write_json
from rar_jax.runs.object_store import Mirror, is_url

FORMAT = "0.2"  # the version of rar_jax that introduced this layout
# Sections that may change when a run is resumed: mesh, sampling, evaluation, logging.
FREE_SECTIONS = ("mesh", "guidance", "evaluate", "wandb")
SHOWN = 12  # differences of two configs in one message
# What config.data says of its source, which may be counted there.
_COUNTED = ("num_classes", "train_records", "class_names")


class Workdir:
    """Paths of one work directory.

    mirror: of a directory in a bucket (object_store.py). Its `path` is a local folder.
    """

    def __init__(self, path: str | pathlib.Path) -> None:
        """Raises: ConfigError for a URL of no bucket."""
        self.mirror: Mirror | None = Mirror(str(path)) if is_url(path) else None
        self.path: pathlib.Path = self.mirror.folder if self.mirror else pathlib.Path(path)
        self.config: pathlib.Path = self.path / "config.json"
        self.result: pathlib.Path = self.path / "result.json"

    def checkpoints(self, stage: str) -> pathlib.Path:
        """Folder of a stage's checkpoints."""
        return self.path / "checkpoints" / stage

    def tokens(self, split: str) -> pathlib.Path:
        """Folder of a split's token store."""
        return self.path / "tokens" / split

    def fetch(self) -> Workdir:
        """Brings the folder up to what the bucket has; process 0 does it.

        Raises: ObjectStoreError if it cannot be read; LeaseError if another process works in the folder.
        """
        if self.mirror is not None:
            from_main(self.mirror.fetch)
        return self

    def send(self) -> None:
        """Sends what was made beside a run, an evaluation's results, to the bucket if there is one."""
        if self.mirror is not None:
            from_main(self.mirror.add)

    def claim(self, config: dict[str, Any], fill_defaults: Callable[[dict[str, Any]], dict[str, Any]] = dict) -> None:
        """Makes the directory this experiment's, or checks that it is. Until something was made, it can change hands.

        Raises: ConfigError with the differences if it belongs to another experiment; what `make` raises.
        """
        self.make()
        from_main(lambda: self._claim(json.loads(json.dumps(config)), fill_defaults))

    def make(self) -> None:
        """Makes the folder. All processes call this: it is where they find out whether they share it.

        Raises: ConfigError if it cannot be made; StorageError if the processes do not see the same directory.
        """
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
        made = sorted(
            p.name for p in self.path.iterdir() if not p.name.startswith((".", "config.json", "ledger.jsonl"))
        )
        if made and not self.config.exists():
            raise ConfigError(
                f"{self.path} has no config.json but is not empty (it holds {made[0]}): choose another --workdir"
            )
        if made and (
            lines := differences(_bound(json.loads(json.dumps(fill_defaults(self.read_config())))), _bound(config))
        ):
            self._refuse_other_images(config)
            told = "; ".join(lines[:SHOWN]) + (f"; and {len(lines) - SHOWN} more" if len(lines) > SHOWN else "")
            if (theirs := self.read_config().get("name")) != (ours := config.get("name")):
                raise ConfigError(
                    f"{self.path} belongs to a run of '{theirs}', this is '{ours}': choose another --workdir. What differs: {told}"
                )
            raise ConfigError(
                f"{self.path} belongs to a run with another config. Choose another --workdir, or undo: {told}"
            )
        self.write_config(config)

    def write_config(self, config: dict[str, Any]) -> None:
        """Write config.json."""
        write_json(self.config, {"version": FORMAT, **config})

    def _refuse_other_images(self, config: dict[str, Any]) -> None:
        """Says it plainly where the images changed and not the config: durations in epochs differ with them."""
        old, new = self.read_config().get("data", {}), config.get("data", {})
        changed = [
            f"{key} {' -> '.join(shortened(str(old.get(key)), str(new.get(key))))}"
            for key in _COUNTED
            if old.get(key) != new.get(key)
        ]
        if changed and old.get("source") == new.get("source"):
            raise ConfigError(
                f"{self.path} was begun with other images of {new.get('source')}: {'; '.join(changed)}. "
                "Bring back what it held then, or choose another --workdir"
            )

    def read_config(self) -> dict[str, Any]:
        """Return the resolved experiment. Raises: ConfigError if it is missing, damaged or of another version."""
        try:
            config = json.loads(self.config.read_text())
            version = config.pop("version", "0.1")
        except FileNotFoundError:
            raise ConfigError(
                f"{self.path} is not a work directory: it has no config.json. Give the --workdir of rar-jax run"
            ) from None
        except (ValueError, AttributeError, TypeError) as error:
            raise ConfigError(f"{self.config} is damaged ({error}): restore it or choose another --workdir") from None
        if version != FORMAT:
            raise ConfigError(
                f"{self.path} was made by rar_jax {version}, and this version reads {FORMAT}: choose another --workdir, "
                f"or install rar_jax {version}"
            )
        return config


def _bound(config: dict[str, Any]) -> dict[str, Any]:
    return {name: section for name, section in config.items() if name not in FREE_SECTIONS}
