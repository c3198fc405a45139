"""Checkpoints: orbax writes them in the background; a manifest of checksums, written last, makes them good.

    <folder>/<step>/state/...       the train state (orbax, OCDBT)
    <folder>/<step>/meta/metadata   JSON: what was trained, for a person
    <folder>/<step>/manifest.json   sha256 and size of every file above, and a hash of itself
    <folder>/best.json              steps that were found the best later, and by which metric: retention keeps them

A step without a manifest that verifies does not count: it is what a crash or a bad disk left. Measured: orbax 0.12.8 alone
restores a file with a flipped bit without a word.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import pathlib
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from rar_jax.errors import CheckpointError
from rar_jax.parallel.processes import from_main, is_main
from rar_jax.runs.disk import full, is_full
from rar_jax.runs.manifest import MANIFEST, verify_from_disk, verify_manifest, write_json, write_manifest

BEST = "best.json"
IRREGULAR = "amid_bad_updates"  # in `meta`: a training that was not stopped here would not have saved the step
MOST_FAILURES = 3  # saves in a row that a full disk may cost
log: logging.Logger = logging.getLogger(__name__)


def good_step(folder: pathlib.Path, *, before: int | None = None, every: int | None = None) -> tuple[int, str] | None:
    """The newest step of a checkpoint folder (below `before`, regular by `every`) that verifies, and its manifest's hash; None if
    there is none.

    Newer steps that do not verify are reported by log warnings that name the bad file. Process 0 looks, and all go by what
    it finds: all processes call this.
    """
    found = from_main(lambda: next(good_steps(folder, before=before, every=every), None))
    return None if found is None else (found[0], found[1])


def good_steps(
    folder: pathlib.Path, *, before: int | None = None, every: int | None = None
) -> Iterator[tuple[int, str]]:
    """Every step that verifies and its manifest's hash, the newest first; log warnings name what is bad. As this process sees it."""
    for step in _steps(folder):
        if not _is_regular(folder, step, every) or (before is not None and step >= before):
            continue
        try:
            yield step, verify_manifest(folder / str(step))
        except CheckpointError as error:
            log.warning("checkpoint step %d is passed over: %s", step, error)


def _steps(folder: pathlib.Path) -> list[int]:
    """All that are whole or were, the newest first."""
    return sorted((int(p.name) for p in folder.glob("*") if p.is_dir() and p.name.isdigit()), reverse=True)


def _is_regular(folder: pathlib.Path, step: int, every: int | None) -> bool:
    """Whether a training saves this step however often it is stopped, so that it may be sent back there. None: all of them count."""
    if every is None:
        return True
    try:
        return step % every == 0 and not read_meta(folder, step).get(IRREGULAR)
    except (OSError, ValueError):  # unfinished or damaged, which its verification will say
        return step % every == 0


def mark_best(folder: pathlib.Path, step: int, metric: str, value: float) -> None:
    """Marks a step in best.json: it is kept until another is the best by this metric, whatever the training's retention."""
    write_json(folder / BEST, _marked(folder) | {metric: {"step": step, "value": value}})


def mark_if_best(folder: pathlib.Path, step: int, metric: str, value: float) -> None:
    """`mark_best` if no other step is known with a lower value. A full disk is a warning."""
    try:
        if value < best_steps(folder).get(metric, {"value": math.inf})["value"]:
            mark_best(folder, step, metric, value)
    except OSError as error:
        if not is_full(error):
            raise
        log.warning("step %d could not be marked in %s: the disk is full; the next start tries again", step, folder)


def best_steps(folder: pathlib.Path) -> dict[str, dict[str, Any]]:
    """The best step by each metric that one was marked or saved with, the lowest: {metric: {"step", "value"}}.

    Of steps that are gone, or in a damaged file, nothing.
    """
    best = _marked(folder)
    for step in reversed(_steps(folder)):
        with contextlib.suppress(CheckpointError, OSError, KeyError):  # unfinished, damaged, or saved without a score
            verify_manifest(folder / str(step), part="meta/")
            metric, value = read_meta(folder, step)["score"]
            if value < best.get(metric, {"value": math.inf})["value"]:
                best[metric] = {"step": step, "value": value}
    return best


def _marked(folder: pathlib.Path) -> dict[str, dict[str, Any]]:
    try:
        marked = json.loads((folder / BEST).read_text())
        return {m: best for m, best in marked.items() if (folder / str(best["step"]) / MANIFEST).is_file()}
    except (OSError, ValueError, AttributeError, KeyError, TypeError):
        return {}


def read_meta(folder: pathlib.Path, step: int) -> dict[str, Any]:
    """What `Checkpointer.save` was told about a step."""
    return json.loads((folder / str(step) / "meta" / "metadata").read_bytes())


def load_params(folder: pathlib.Path, step: int, shardings: Any = None) -> Any:
    """The parameters to evaluate of one step, the EMA where there is one.

    Args:
      shardings: tree of where each array shall lie: each process then reads its own part, and the host holds no other
        copy. None: NumPy arrays.

    Returns: nested dict of jax.Arrays, or of NumPy arrays.
    """
    path = epath.Path(folder.absolute()) / str(step) / "state"  # orbax finds no metadata by a relative path
    # The handler and not a checkpointer, which would warn that a single item has no metadata of a whole checkpoint.
    handler = ocp.PyTreeCheckpointHandler()
    tree: Any = handler.metadata(path).tree
    names = ("extra", "ema") if tree.get("extra") else ("params",)
    for name in names:
        tree = tree[name]
    if shardings is None:
        restore_args = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
    else:
        restore_args = jax.tree.map(lambda at: ocp.ArrayRestoreArgs(sharding=at), shardings)
    for name in reversed(names):
        tree, restore_args = {name: tree}, {name: restore_args}
    out: Any = handler.restore(
        path, args=ocp.args.PyTreeRestore(item=tree, restore_args=restore_args, partial_restore=True)
    )
    handler.close()
    for name in names:
        out = out[name]
    return out


class Checkpointer:
    """Saves states of one training in the background and restores the newest good one.

    Args:
      keep: so many of the newest steps, besides those that are marked as the best and one that is being written.
      every: the steps that are saved in any case, the regular ones, are its multiples; None: all. `keep` counts those; others, which a
        preemption saved, stay until a newer step was read, and no training is sent back to them: where it goes must not depend on
        when it was stopped.
      verify: reads each step again once it is on disk; a difference is an error at the next call.
      on_full_disk: told of each step that could not be saved for want of room. on_saved: on process 0, of each that counts.
    """

    def __init__(
        self,
        folder: pathlib.Path,
        *,
        keep: int,
        every: int | None = None,
        verify: bool = False,
        on_full_disk: Callable[[int], None] = lambda step: None,
        on_saved: Callable[[int], None] = lambda step: None,
    ) -> None:
        self.folder: pathlib.Path = folder
        self._keep, self._every, self._verify = keep, every, verify
        self._on_full_disk, self._on_saved = on_full_disk, on_saved
        folder.mkdir(parents=True, exist_ok=True)
        self._manager = ocp.CheckpointManager(
            folder.absolute(), options=ocp.CheckpointManagerOptions(cleanup_tmp_directories=True)
        )
        self._threads = ThreadPoolExecutor(1)
        self._unfinished: int | None = None
        self._step, self._failures = 0, 0  # of the last save; in a row, for want of room
        self._retain = True
        self._manifest: Future[None] | None = None

    def save(
        self,
        step: int,
        state: Any,
        meta: dict[str, Any],
        score: tuple[str, float] | None = None,
        *,
        retain: bool = True,
    ) -> None:
        """Starts a save; an error of the one before is raised here.

        A full disk is a warning, and the training goes on: what the save had written is removed, older steps stay. After
        MOST_FAILURES saves in a row it is an error.

        Args:
          meta: JSON; with IRREGULAR no training is sent back to this step, whatever its number.
          score: name and value, lower is better, kept in `meta`: the best step by it outlives the retention.
          retain: lets go of older steps. Not where there is no time to read what is newer: a preemption.
        """
        self._retain &= retain  # what is still to be done for the step before
        self.wait()
        self._step = step
        with self._full_disk_is_a_warning():
            size = sum(x.nbytes for x in jax.tree.leaves(state))
            if (free := from_main(lambda: shutil.disk_usage(self.folder).free)) < size:
                raise full(self.folder, f"{free:,} bytes free of {size:,}")
            meta = meta if score is None else meta | {"score": score}
            args = ocp.args.Composite(state=ocp.args.StandardSave(state), meta=ocp.args.JsonSave(meta))
            self._manager.save(step, args=args, force=True)
            self._unfinished, self._retain = step, retain

    def poll(self) -> None:
        """Starts the manifest as soon as the files are whole; costs nothing otherwise. Call it every step."""
        with self._full_disk_is_a_warning():
            if self._unfinished is not None and not self._manager.is_saving_in_progress():
                step, self._unfinished = self._unfinished, None
                self._manager.wait_until_finished()  # raises what the background save raised
                if is_main():  # orbax's save is in progress until every process has written
                    self._manifest = self._threads.submit(
                        _finish, self.folder, step, self._verify, self._retain, self._keep, self._every
                    )
                else:
                    self._failures = 0
            if self._manifest is not None and self._manifest.done():
                manifest, self._manifest = self._manifest, None
                manifest.result()
                self._failures = 0
                self._on_saved(self._step)

    def wait(self) -> None:
        """Returns once the last save and its manifest are on disk."""
        if self._unfinished is not None:
            with self._full_disk_is_a_warning():
                self._manager.wait_until_finished()
            self.poll()
        if self._manifest is not None:
            wait([self._manifest])
            self.poll()

    @contextlib.contextmanager
    def _full_disk_is_a_warning(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            if not is_full(error):
                raise
            self._unfinished = self._manifest = None
            self._failures += 1
            if is_main():
                # Orbax leaves what it had written, which would keep the disk full.
                for path in [*self.folder.glob(f"{self._step}.orbax-checkpoint-tmp*"), self.folder / str(self._step)]:
                    shutil.rmtree(path, ignore_errors=True)
            self._manager.reload()
            self._on_full_disk(self._step)
            reason = f"step {self._step} could not be saved in {self.folder}: the disk is full"
            if self._failures >= MOST_FAILURES:
                raise CheckpointError(
                    f"{reason}, {self._failures} times in a row. Make room and give the same command again: it goes on from the "
                    "newest step that is there"
                ) from error
            log.warning("%s; the training goes on, and the next save tries again (%s)", reason, str(error)[:200])

    def restore(self, abstract_state: Any, *, before: int | None = None) -> Any | None:
        """The newest good state, placed as `abstract_state`'s shardings say; None if nothing was saved yet.

        Newer steps are set aside as <step>.unfinished (a save that was cut off), <step>.damaged or <step>.rewound, so that
        they can be written again; of unfinished ones only the last are kept.

        Args:
          before: only steps below this one count, and of them multiples of `every`.

        Raises: CheckpointError if there are damaged steps and no good one.
        """
        self.wait()
        good = good_step(self.folder, before=before, every=None if before is None else self._every)
        self._set_aside(good, before)
        if good is None:
            return None
        older = [step for step in _steps(self.folder) if step < good[0]]
        from_main(lambda: _let_go(self.folder, {s for s in older if not _is_regular(self.folder, s, self._every)}))
        restored = self._manager.restore(
            good[0], args=ocp.args.Composite(state=ocp.args.StandardRestore(abstract_state))
        )
        return restored["state"]

    def start_again(self) -> None:
        """Sets aside all steps, damaged ones too: for what can be made again from elsewhere."""
        self._set_aside(None, None, made_again=True)

    def _set_aside(self, good: tuple[int, str] | None, before: int | None, *, made_again: bool = False) -> None:
        if from_main(lambda: self._rename(good, before, made_again)):
            self._manager.reload()

    def _rename(self, good: tuple[int, str] | None, before: int | None, made_again: bool) -> list[int]:
        """Renames the steps that are newer than the good one. Process 0 does it."""
        newer = sorted(step for step in _steps(self.folder) if good is None or step > good[0])
        irregular = [step for step in newer if not _is_regular(self.folder, step, self._every)]
        rewound = [step for step in newer if before is not None and (step >= before or step in irregular)]
        damaged = [step for step in newer if step not in rewound and (self.folder / str(step) / MANIFEST).exists()]
        if good is None and damaged and not made_again:
            raise CheckpointError(
                f"no step in {self.folder} is good; {damaged[-1]} is damaged (see the warnings above). Restore the files from a "
                "copy, or move the folder away to start this stage again"
            )
        unfinished = [step for step in newer if step not in rewound and step not in damaged]
        if unfinished:  # or a training that is killed often would fill the disk with what nobody needs
            for earlier in self.folder.glob("*.unfinished"):
                shutil.rmtree(earlier, ignore_errors=True)
        marked = _marked(self.folder)
        if (
            before is not None
            and (kept := {m: best for m, best in marked.items() if best["step"] not in newer}) != marked
        ):
            write_json(self.folder / BEST, kept)  # the others' steps will be other ones when they are written again
        for step in newer:
            why = "rewound" if step in rewound else "damaged" if step in damaged else "unfinished"
            aside = self.folder / f"{step}.{why}"
            shutil.rmtree(aside, ignore_errors=True)  # of an earlier time
            (self.folder / str(step)).rename(aside)
        return newer

    def close(self) -> None:
        """Finishes what is under way and frees the threads."""
        try:
            self.wait()
            # More have been an error already, which this would take the place of.
            if 0 < self._failures < MOST_FAILURES:
                raise CheckpointError(
                    f"step {self._step}, the last, could not be saved in {self.folder}: the disk is full. Make room and give the "
                    "same command again"
                )
        finally:
            self._threads.shutdown()
            self._manager.close()


def _finish(folder: pathlib.Path, step: int, verify: bool, retain: bool, keep: int, every: int | None) -> None:
    """Makes a step count, and only then lets go of older ones."""
    write_manifest(folder / str(step))
    if verify:
        verify_from_disk(folder / str(step))
    if not retain:
        return
    steps = _steps(folder)
    old = set(steps) - {steps[0], *[known for known in steps if _is_regular(folder, known, every)][:keep]}
    if old and not verify:
        old -= _newest_on_disk(folder, every)
    _let_go(folder, old)


def _let_go(folder: pathlib.Path, old: set[int]) -> None:
    for step in old - {best["step"] for best in best_steps(folder).values()}:
        shutil.rmtree(folder / str(step), ignore_errors=True)


def _newest_on_disk(folder: pathlib.Path, every: int | None) -> set[int]:
    """The newest step that the disk holds as it was written, the newest regular one, and any between."""
    found: set[int] = set()
    for step in _steps(folder):
        try:
            verify_from_disk(folder / str(step))
        except CheckpointError as error:
            log.warning("checkpoint step %d is not what was written: %s", step, error)
        else:
            found.add(step)
            if _is_regular(folder, step, every):
                break
    return found


def save_params(folder: pathlib.Path, params: Any, meta: dict[str, Any]) -> None:
    """Saves parameters that were not trained here as step 0, with the manifest that makes it count.

    What is there, of a save that was cut off or on a disk that rots, is set aside.
    """
    checkpointer = Checkpointer(folder, keep=2)
    try:
        checkpointer.start_again()
        checkpointer.save(0, {"params": params}, {"step": 0, **meta})
    finally:
        checkpointer.close()
