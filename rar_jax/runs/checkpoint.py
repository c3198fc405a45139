"""Checkpoints: the arrays are written in the background, and a manifest of checksums, written last, commits the step.

    <folder>/<step>/state-1a2b3c4d/ the arrays of the train state (arrays.py)
    <folder>/<step>/meta.json       facts about the step
    <folder>/<step>/manifest.json   sha256 of every file above, and of itself
    <folder>/best.json              the best steps by some metrics: retention keeps them

A step without a manifest does not count, and is deleted after the next commit. (Orbax alone restores a file with a
flipped bit without an error, and its retention counts steps that do not verify.)
"""

from __future__ import annotations

import contextlib
import errno
import functools
import json
import logging
import math
import os
import pathlib
import secrets
import shutil
import threading
from collections.abc import Callable, Iterator
from typing import Any

import jax

from rar_jax.errors import CheckpointError
from rar_jax.parallel.processes import from_main, is_main
from rar_jax.runs.arrays import load_state, load_tree, make_writer, read_array_names
from rar_jax.runs.bucket import BucketPath, Path, remove_tree
from rar_jax.runs.disk import is_full
from rar_jax.runs.manifest import MANIFEST, verify_from_disk, verify_manifest, write_json, write_manifest

BEST, META, DISCARDED, ARRAYS = "best.json", "meta.json", "discarded.json", "state-"
EMA = "ema."
MAX_FAILURES = 3  # saves in a row that may fail because the disk is full or the bucket unreachable
log: logging.Logger = logging.getLogger(__name__)


# ---------------------------------------------------------------- steps


def good_step(folder: Path, *, before: int | None = None, every: int | None = None) -> tuple[int, str] | None:
    """Return the newest step that verifies, and its manifest's hash; None if there is none. A barrier: process 0 looks.

    Newer steps that do not verify are reported by log warnings that name the bad file.

    Args:
      before: only steps below this one. every: only its multiples.
    """
    found = from_main(lambda: next(good_steps(folder, before=before, every=every), None))
    return None if found is None else (found[0], found[1])


def good_steps(folder: Path, *, before: int | None = None, every: int | None = None) -> Iterator[tuple[int, str]]:
    """Yield every step that verifies, newest first, and its manifest's hash."""
    for step in list_steps(folder):
        if _is_regular(step, every) and (before is None or step < before):
            try:
                yield step, verify_manifest(folder / str(step))
            except CheckpointError as error:
                log.warning("checkpoint step %d is skipped: %s", step, error)


def list_steps(folder: Path) -> list[int]:
    """Return all steps, newest first, committed or not."""
    if not folder.is_dir():
        return []
    return sorted((int(path.name) for path in folder.iterdir() if path.name.isdigit()), reverse=True)


def _is_regular(step: int, every: int | None) -> bool:
    """Whether a training saves this step even if it is never preempted. Only these are rolled back to."""
    return every is None or step % every == 0


def _is_committed(folder: Path, step: int) -> bool:
    return (folder / str(step) / MANIFEST).is_file()


def read_meta(folder: Path, step: int) -> dict[str, Any]:
    """Return the `meta` of a saved step."""
    return json.loads((folder / str(step) / META).read_bytes())


# ---------------------------------------------------------------- the best steps


def mark_best(folder: Path, step: int, metric: str, value: float) -> None:
    """Mark a step as the best by a metric: retention keeps it until another one is marked."""
    write_json(folder / BEST, best_steps(folder) | {metric: {"step": step, "value": value}})


def mark_if_best(folder: Path, step: int, metric: str, value: float) -> None:
    """Mark a step unless another one has a lower value. A full disk is a warning."""
    try:
        if value < best_steps(folder).get(metric, {"value": math.inf})["value"]:
            mark_best(folder, step, metric, value)
    except OSError as error:
        if not is_full(error):
            raise
        log.warning("step %d was not marked in %s: the disk is full; the next start tries again", step, folder)


def best_steps(folder: Path) -> dict[str, dict[str, Any]]:
    """Return the committed steps that are marked as the best: {metric: {"step", "value"}}."""
    try:
        marked = json.loads((folder / BEST).read_bytes())
        return {metric: best for metric, best in marked.items() if _is_committed(folder, best["step"])}
    except (OSError, ValueError, AttributeError, KeyError, TypeError):
        return {}


def find_arrays(folder: Path, step: int) -> Path:
    """Return the folder of a step's arrays."""
    return next(path for path in (folder / str(step)).iterdir() if path.name.startswith(ARRAYS))


def load_params(folder: Path, step: int, shardings: Any = None, *, raw: bool = False) -> Any:
    """Return the parameters of a step, the EMA where there is one and `raw` is false, as a nested dict.

    Args:
      shardings: tree of shardings, or None for NumPy arrays.
    """
    arrays = find_arrays(folder, step)
    has_ema = not raw and any(name.startswith(EMA) for name in read_array_names(arrays))
    return load_tree(arrays, EMA if has_ema else "params.", shardings)


# ---------------------------------------------------------------- saving and restoring


class Checkpointer:
    """Saves states of one training in the background and restores the newest good one.

    Args:
      keep: number of the newest regular steps that retention keeps, besides the best ones and the newest.
      every: multiples of it are regular; None: all steps. A rollback restores only regular steps: it must not depend on
        when the run was preempted.
      verify: read each step again once it is written; a difference is an error at the next call.
      before_commit: called on process 0 in a background thread: it uploads files that belong to the step.
      on_full_disk: called with each step that could not be saved.
      on_saved: called on process 0 with each committed step.
    """

    def __init__(
        self,
        folder: Path,
        *,
        keep: int,
        every: int | None = None,
        verify: bool = False,
        before_commit: Callable[[], None] = lambda: None,
        on_full_disk: Callable[[int], None] = lambda step: None,
        on_saved: Callable[[int], None] = lambda step: None,
    ) -> None:
        self.folder: Path = folder if isinstance(folder, BucketPath) else folder.absolute()
        self._keep, self._every, self._verify = keep, every, verify
        self._before_commit, self._on_full_disk, self._on_saved = before_commit, on_full_disk, on_saved
        self.folder.mkdir(parents=True, exist_ok=True)
        self._writer = make_writer(self.folder)
        self._step, self._failures, self._reason, self._saving = 0, 0, "", False
        self._committed = threading.Event()
        self._commit_error: BaseException | None = None

    def save(
        self,
        step: int,
        state: Any,
        meta: dict[str, Any],
        score: tuple[str, float] | None = None,
        *,
        retain: bool = True,
    ) -> None:
        """Start a save. Errors of the previous one are raised here.

        A full disk or an unreachable bucket is a warning: older steps stay. After MAX_FAILURES saves in a row it is an
        error.

        Args:
          meta: JSON. score: name and value, lower is better: retention keeps the best step by it.
          retain: delete older steps. A preemption leaves no time for that.
        """
        self.wait()
        self._step = step
        with self._tolerate_failures():
            name = from_main(lambda: self._prepare(step, sum(x.nbytes for x in jax.tree.leaves(state))))
            arrays = self.folder / str(step) / name
            self._committed.clear()
            self._writer.start(state, arrays, functools.partial(self._commit, arrays, meta, score, retain))
            self._saving = True

    def _prepare(self, step: int, size: int) -> str:
        """Make room for a step. Returns: a new name, since TensorStore caches stores by their path."""
        remove_tree(self.folder / str(step))
        (self.folder / str(step)).mkdir()
        if isinstance(self.folder, pathlib.Path) and (free := shutil.disk_usage(self.folder).free) < size:
            why = f"{os.strerror(errno.ENOSPC)}: {free:,} bytes free of {size:,}"
            raise OSError(errno.ENOSPC, why, str(self.folder))
        return ARRAYS + secrets.token_hex(4)

    def _commit(self, arrays: Path, meta: dict[str, Any], score: tuple[str, float] | None, retain: bool) -> None:
        """Run on process 0 in the writer's thread, once every process has written its shards."""
        folder, step = arrays.parent, int(arrays.parent.name)
        try:
            write_json(folder / META, meta)
            self._before_commit()
            if score is not None:  # the mark counts as soon as the step does
                mark_if_best(self.folder, step, *score)
            write_manifest(folder)
            if self._verify:
                verify_from_disk(folder)
            if retain:
                self._delete_old(step)
        except BaseException as error:
            self._commit_error = error
        self._committed.set()

    def _delete_old(self, newest: int) -> None:
        """Verify the newest step, then delete those that retention does not keep or that are not committed."""
        steps = list_steps(self.folder)
        committed = [step for step in steps if _is_committed(self.folder, step)]
        kept = {newest, *[step for step in committed if _is_regular(step, self._every)][: self._keep]}
        kept |= {best["step"] for best in best_steps(self.folder).values()}
        if set(committed) - kept:
            try:
                verify_from_disk(self.folder / str(newest))
            except CheckpointError as error:
                log.warning("checkpoint step %d is not what was written, older steps stay: %s", newest, error)
                kept |= set(committed)
        for path in (self.folder / str(step) for step in set(steps) - kept):
            (path / MANIFEST).unlink(missing_ok=True)  # first: half of a step must not count
            remove_tree(path)

    def poll(self) -> None:
        """Notice a finished save. Cheap: call it every step."""
        with self._tolerate_failures():
            self._writer.check()
            if self._saving and self._committed.is_set():
                self._finish()

    def wait(self) -> None:
        """Return once the last save is committed."""
        with self._tolerate_failures():
            if self._saving:
                self._writer.wait()
                self._finish()

    def _finish(self) -> None:
        self._saving = False
        error, self._commit_error = self._commit_error, None
        if error is not None:
            raise error
        self._failures = 0
        if is_main():
            self._on_saved(self._step)

    @contextlib.contextmanager
    def _tolerate_failures(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            away = isinstance(self.folder, BucketPath) and not isinstance(error, (CheckpointError, TypeError))
            if not away and not is_full(error):
                raise
            self._saving, self._commit_error = False, None
            self._failures += 1
            self._writer = make_writer(self.folder)
            if is_main():  # make room
                for step in list_steps(self.folder):
                    if not _is_committed(self.folder, step):
                        remove_tree(self.folder / str(step))
            self._on_full_disk(self._step)
            why = "the disk is full" if is_full(error) else "the bucket is unreachable"
            reason = f"step {self._step} could not be saved in {self.folder}: {why}"
            self._reason = (
                f"{reason}, {self._failures} times in a row. Fix that and rerun the command: it resumes from the "
                "newest saved step"
            )
            if self._failures >= MAX_FAILURES:
                raise CheckpointError(self._reason) from error
            log.warning("%s; training continues, and the next save tries again (%s)", reason, str(error)[:200])

    def restore(self, abstract_state: Any, *, before: int | None = None) -> Any | None:
        """Restore the newest good state, sharded as `abstract_state`; None if nothing was saved yet.

        Newer steps no longer count: damaged and rolled back ones lose their manifest, unfinished ones are deleted.

        Args:
          before: roll back: only regular steps below this one count.

        Raises: CheckpointError if there are damaged steps and no good one.
        """
        self.wait()
        good = good_step(self.folder, before=before, every=None if before is None else self._every)
        from_main(lambda: self._discard_newer(-1 if good is None else good[0], before))
        if good is None:
            return None
        return load_state(find_arrays(self.folder, good[0]), abstract_state)

    def _discard_newer(self, good: int, before: int | None) -> None:
        newer = [step for step in list_steps(self.folder) if step > good]
        committed = [step for step in newer if _is_committed(self.folder, step)]
        damaged = [step for step in committed if before is None or (step < before and _is_regular(step, self._every))]
        if good < 0 and damaged:
            raise CheckpointError(
                f"no step in {self.folder} is good; {damaged[0]} is damaged (see the warnings above). Restore its "
                "files from a copy, or move the folder away to restart this stage"
            )
        if newer and (self.folder / BEST).is_file():  # a step of the same number may be saved again
            marked = best_steps(self.folder).items()
            write_json(self.folder / BEST, {metric: best for metric, best in marked if best["step"] not in newer})
        for step in newer:
            path = self.folder / str(step)
            if step in committed:
                write_json(path / DISCARDED, "damaged" if step in damaged else "rolled back")
                (path / MANIFEST).unlink()
            else:
                remove_tree(path)

    def close(self) -> None:
        """Finish the save that is under way. Raises: CheckpointError if the last step could not be saved."""
        self.wait()
        if 0 < self._failures < MAX_FAILURES:  # more have raised already
            raise CheckpointError(self._reason)


def save_params(folder: Path, params: Any, meta: dict[str, Any]) -> None:
    """Save parameters that were not trained here as step 0, in place of all steps."""
    with contextlib.closing(Checkpointer(folder, keep=2)) as checkpointer:
        from_main(lambda: [remove_tree(folder / str(step)) for step in list_steps(folder)] and None)
        checkpointer.save(0, {"params": params}, {"step": 0, **meta})
