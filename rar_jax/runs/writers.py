"""TensorBoard and Weights & Biases. Steps may be repeated; images are uint8 (height, width, 1 or 3)."""

from __future__ import annotations

import importlib
import json
import pathlib
import secrets
import sys
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
from tensorboardX import summary
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog  # pyright: ignore[reportAttributeAccessIssue]

from rar_jax.config import require
from rar_jax.errors import ConfigError
from rar_jax.runs.manifest import write_json

FLUSH_SECONDS = 10.0  # between two flushes, each of which waits for the disk


class TensorBoardWriter:
    """Event files in `folder`. Points of an earlier process from `purge_step` on are hidden.

    Not tensorboardX's SummaryWriter: on a full disk its thread dies, and training would wait for it forever.
    """

    def __init__(self, folder: pathlib.Path, purge_step: int | None) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._file = EventsWriter(str(folder / "events"))
        self._flushed = -FLUSH_SECONDS
        if purge_step is not None:
            self._write(Event(step=purge_step, session_log=SessionLog(status=SessionLog.START)))

    def write_scalars(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._write(Event(step=step, summary=summary.scalar(name, value)))

    def write_image(self, step: int, name: str, image: np.ndarray) -> None:
        self._write(Event(step=step, summary=summary.image(name, image, dataformats="HWC")))

    def close(self) -> None:
        self._file.close()

    def _write(self, event: Any) -> None:
        event.wall_time = time.time()
        self._file.write_event(event)
        if time.monotonic() - self._flushed >= FLUSH_SECONDS:
            self._file.flush()
            self._flushed = time.monotonic()


class WandbWriter:
    """Weights & Biases: one of its runs per stage, all stages of a work directory in one group.

    A resumed stage continues its own run. Files are in WORKDIR/wandb; with WANDB_MODE=offline, `wandb sync` sends them.

    Raises: ConfigError if the package is missing or does not start.
    """

    def __init__(self, workdir: pathlib.Path, stage: str, project: str, *, quiet: bool) -> None:
        self._wandb = import_wandb()
        identity, config = workdir / "wandb.json", workdir / "config.json"
        if not identity.exists():  # not derived from the path: a work directory may be moved
            write_json(identity, {"group": secrets.token_hex(4)})
        group = json.loads(identity.read_text())["group"]
        try:
            self._run = self._wandb.init(
                project=project,
                group=group,
                job_type=stage,
                id=f"{group}-{stage}",
                name=f"{workdir.resolve().name} {stage}",
                dir=str(workdir),
                resume="allow",
                reinit="create_new",  # never into a run that a notebook has open
                config=json.loads(config.read_text()) if config.exists() else {},
                allow_val_change=True,  # the mesh differs between machines
                settings=self._wandb.Settings(console="off", silent=quiet or not sys.stderr.isatty()),
            )
        except self._wandb.errors.Error as error:
            reason = " ".join(str(error).split())
            raise ConfigError(
                f"Weights & Biases does not start ({reason}): run `wandb login`, or set WANDB_MODE=offline"
            ) from None

    def write_scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._log(step, values)

    def write_image(self, step: int, name: str, image: np.ndarray) -> None:
        self._log(step, {name: self._wandb.Image(image)})

    def close(self) -> None:
        self._run.finish()

    def _log(self, step: int, values: Mapping[str, Any]) -> None:
        # It warns of each step that it has already: those between the last checkpoint and a crash.
        if step >= self._run.step:
            self._run.log(dict(values), step=step)


def import_wandb() -> Any:
    """Import `wandb`. Raises: ConfigError if it is not installed."""
    try:
        package = importlib.import_module("wandb")
    except ImportError:
        package = None
    # A folder named wandb in the working directory can be imported, too.
    require(hasattr(package, "init"), "config.wandb needs pip install -e '.[wandb]', or set --config.wandb=None")
    return package
