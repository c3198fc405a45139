"""Processes that a cluster started find each other without flags. Slurm is told by its environment variables alone."""

import json
import subprocess
import sys

import pytest
from commands import environment

SCRIPT = """
import json, jax
from rar_jax.parallel import processes
processes.join_processes()
told = processes.gather_strings(str(jax.process_index()))
print(json.dumps([jax.process_index(), jax.process_count(), len(jax.devices()), told]))
"""


def slurm(task: int, tasks: int) -> dict[str, str]:
    """What `srun` sets in each task of a step on one node. JAX makes the coordinator's port of the job's number."""
    return {
        "SLURM_JOB_ID": "4321", "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": str(tasks), "SLURM_STEP_NUM_TASKS": str(tasks),
        "SLURM_PROCID": str(task), "SLURM_LOCALID": str(task), "SLURM_STEP_NUM_NODES": "1",
    }  # fmt: skip


@pytest.mark.parametrize("tasks", [1, 2])
def test_slurm(tasks: int) -> None:
    running = [
        subprocess.Popen(
            [sys.executable, "-c", SCRIPT], env=environment() | slurm(task, tasks), text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for task in range(tasks)
    ]  # fmt: skip
    told = [process.communicate(timeout=120) for process in running]
    assert [process.returncode for process in running] == [0] * tasks, told
    found = [json.loads(out.splitlines()[-1]) for out, _ in told]  # gloo tells of itself before
    assert found == [[task, tasks, tasks, [str(other) for other in range(tasks)]] for task in range(tasks)]
