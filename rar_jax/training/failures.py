"""What a failing training leaves behind: hints for memory, dumps for bad updates."""

from __future__ import annotations

import contextlib
import io

import jax
import numpy as np

from rar_jax.experiment import Experiment
from rar_jax.runs.bucket import write_file
from rar_jax.runs.checkpoint import Checkpointer
from rar_jax.runs.workdir import Workdir
from rar_jax.training.step import Batch, State


def oom_hint(experiment: Experiment, stage: str) -> tuple[str, str]:
    """Return what runs out of memory, and what to change: for `memory.exhaustion`."""
    section = {"tokenizer": "tokenizer_train", "classifier": "classifier.train"}.get(stage, "train")
    recipe = experiment.recipe(stage)
    assert recipe is not None
    sizes = f"config.{section}.batch_size {recipe.batch_size}, accumulation {recipe.accumulation}"
    accumulation = f"increase config.{section}.accumulation (same training, smaller parts)"
    remat = f", or set config.{stage}.remat=True" if hasattr(experiment.model(stage).config, "remat") else ""
    shard = f"shard over more devices with config.mesh.fsdp{remat}"
    return f"training the {stage}, {sizes}", f"{accumulation}, decrease batch_size, or {shard}"


def dump_failure(workdir: Workdir, stage: str, state: State, batch: Batch) -> str:
    """Write state and batch for debugging, and return the error message.

    WORKDIR/dump/<stage>/<step>/ is a checkpoint of the state, which bad updates did not change. batch.<process>.npz
    holds this process's rows of the last batch.
    """
    folder, step = workdir.root / "dump" / stage, int(state["step"])
    with contextlib.closing(Checkpointer(folder, keep=2)) as checkpointer:
        checkpointer.save(step, state, {"step": step, "stage": stage})
    here = {name: [np.asarray(s.data) for s in x.addressable_shards if s.replica_id == 0] for name, x in batch.items()}
    np.savez(
        rows := io.BytesIO(), allow_pickle=False, **{k: np.concatenate(parts) for k, parts in here.items() if parts}
    )
    write_file(folder / f"batch.{jax.process_index()}.npz", rows.getvalue())
    consecutive, rollbacks, skipped = (int(state["guard"][name]) for name in ("consecutive", "rollbacks", "skipped"))
    return (
        f"{stage}: {consecutive} consecutive bad updates (non-finite or spiking loss or gradient) at step {step}, "
        f"after {rollbacks} rollback(s); {skipped} updates were skipped in all. State and batch are in {folder}. "
        "Train in a new --workdir with a lower learning_rate or a longer warmup; this one keeps its last good step"
    )
