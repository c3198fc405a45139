"""Where a stage's scalars and pictures go besides metrics.jsonl: TensorBoard's files and, if asked for, Weights & Biases."""

from __future__ import annotations

import importlib
import json
import pathlib
import secrets
import sys
import time
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
from tensorboardX import summary
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog  # pyright: ignore[reportAttributeAccessIssue]

from rar_jax.errors import ConfigError
from rar_jax.runs.manifest import write_json

FLUSH_SECONDS = (
    10.0  # between two times that events are sent to the disk: it is waited for, a tenth of a second where it is slow
)


class Writer(Protocol):
    """What a Reporter tells. Steps may come twice, and images are uint8 (height, width, 1 or 3)."""

    def scalars(self, values: Mapping[str, float], step: int) -> None: ...
    def image(self, name: str, image: np.ndarray, step: int) -> None: ...
    def close(self) -> None: ...


class TensorBoard:
    """Event files in `folder`; points from `purge_step` on, of a process before, are hidden.

    Not tensorboardX's SummaryWriter, whose thread dies of a full disk and leaves the training waiting for it, for ever.
    """

    def __init__(self, folder: pathlib.Path, purge_step: int | None) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._file = EventsWriter(str(folder / "events"))
        self._flushed = -FLUSH_SECONDS
        if purge_step is not None:
            self._write(Event(step=purge_step, session_log=SessionLog(status=SessionLog.START)))

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self._write(Event(step=step, summary=summary.scalar(name, value)))

    def image(self, name: str, image: np.ndarray, step: int) -> None:
        self._write(Event(step=step, summary=summary.image(name, image, dataformats="HWC")))

    def close(self) -> None:
        self._file.close()

    def _write(self, event: Any) -> None:
        event.wall_time = time.time()
        self._file.write_event(event)
        if time.monotonic() - self._flushed >= FLUSH_SECONDS:
            self._file.flush()
            self._flushed = time.monotonic()


class WandB:
    """Weights & Biases: one of its runs for each stage, those of a work directory in one group; a stage that resumes goes on in
    its own. Its files lie in WORKDIR/wandb: with WANDB_MODE=offline all that there is, until `wandb sync` sends it.

    Raises: ConfigError if the package is not there, or will not begin.
    """

    def __init__(self, workdir: pathlib.Path, stage: str, project: str, *, quiet: bool) -> None:
        self._wandb = wandb_package()
        identity = (
            workdir / "wandb.json"
        )  # in a file, and not the path's: a work directory may be moved, or named like another
        if not identity.exists():
            write_json(identity, {"group": secrets.token_hex(4)})
        group = json.loads(identity.read_text())["group"]
        config = workdir / "config.json"
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
                allow_val_change=True,  # the mesh is another on another machine
                settings=self._wandb.Settings(
                    console="off", silent=quiet or not sys.stderr.isatty()
                ),  # off: the progress line stays a terminal's
            )
        except self._wandb.errors.Error as error:
            raise ConfigError(
                f"Weights & Biases does not begin ({' '.join(str(error).split())}): give `wandb login`, or set WANDB_MODE=offline"
            ) from None

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        self._log(values, step)

    def image(self, name: str, image: np.ndarray, step: int) -> None:
        self._log({name: self._wandb.Image(image)}, step)

    def close(self) -> None:
        self._run.finish()

    def _log(self, values: Mapping[str, Any], step: int) -> None:
        # It refuses, with a warning each, the steps that it has: those between the last checkpoint and a crash come again.
        if step >= self._run.step:
            self._run.log(dict(values), step=step)


def wandb_package() -> Any:
    """The module `wandb`. Raises: ConfigError if it is not installed."""
    try:
        package = importlib.import_module("wandb")
    except ImportError:
        package = None
    if not hasattr(package, "init"):  # a folder of its runs in the working directory can be imported, too
        raise ConfigError(
            "config.wandb needs a package that is not here: pip install -e '.[wandb]' in the checkout of rar_jax, or leave it out (--config.wandb=None)"
        )
    return package
