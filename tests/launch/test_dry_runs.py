"""docs/launching.md is what the scripts print: `LAUNCH_PAGE=docs/launching.md pytest tests/launch/test_dry_runs.py` writes it."""

import os
import pathlib
import shlex
import subprocess

ROOT = pathlib.Path(__file__).parents[2]
PAGE = ROOT / "docs" / "launching.md"
RAR_B = "--config rar_b --workdir /mnt/rar_jax/rar_b --config.generator.remat=True"
TPU = "--name mine --zone us-west4-a --type v5litepod-16 --runtime v2-alpha-tpuv5-lite"
GKE = "--cluster mine --zone us-west4-a --project P --name rar-b --type v5litepod-16 --image REGISTRY/rar_jax"
COMMANDS = {
    "One TPU slice": f"launch/tpu_pod.sh run --dry-run {TPU} --spot --nfs 10.0.0.2:/share {RAR_B}",
    "Several TPU slices": f"launch/tpu_multislice.sh run --dry-run {TPU} --slices 2 --nfs 10.0.0.2:/share {RAR_B}",
    "GKE": f"launch/gke_xpk.sh --dry-run {GKE} {RAR_B}",
    "Slurm": "bash launch/slurm.sbatch --dry-run --config rar_b --workdir runs/rar_b",
    "This machine": "launch/local.sh --dry-run --devices 2 2 --config digits --workdir runs/two",
}
HEAD = """# What the launch scripts run

Printed by `--dry-run`, which prints every command and runs none; written here by `tests/launch/test_dry_runs.py`. No cloud has seen
them from here: they are tested with stand-ins for `gcloud`, `xpk`, `srun` and `docker` (`pytest tests/launch`).
[ImageNet on a pod](imagenet.md) has them step by step, [Reliability](reliability.md) what a preemption does.
"""


def test_the_page_is_what_they_print() -> None:
    parts = [HEAD]
    for title, command in COMMANDS.items():
        argv = shlex.split(command.removeprefix("bash "))
        done = subprocess.run(["bash", *argv], cwd=ROOT, capture_output=True, text=True, check=True, timeout=60)
        assert done.stdout.strip() and str(ROOT) not in done.stdout
        parts.append(f"## {title}\n\n```\n$ {command}\n{done.stdout.strip()}\n```\n")
    page = "\n".join(parts)
    if name := os.environ.get("LAUNCH_PAGE"):
        pathlib.Path(name).write_text(page)
    assert page == PAGE.read_text()
