"""`evaluate --steps`: the score of several checkpoints of a work directory, and the best of them marked."""

from __future__ import annotations

import pathlib
from typing import Any

from rar_jax.config import require
from rar_jax.errors import ConfigError
from rar_jax.evaluation.program import Program, Settings, shift_of
from rar_jax.evaluation.reference import read_reference
from rar_jax.evaluation.scores import evaluate, load_network, made_from
from rar_jax.parallel.mesh import MeshConfig, make_mesh
from rar_jax.parallel.processes import from_main
from rar_jax.pipeline import load
from rar_jax.runs.bucket import Path
from rar_jax.runs.checkpoint import best_steps, good_steps, mark_best
from rar_jax.runs.manifest import write_json
from rar_jax.runs.workdir import Workdir
from rar_jax.sampling import Guidance


def score_steps(
    workdir: pathlib.Path,
    inception_path: pathlib.Path,
    out: pathlib.Path,
    *,
    steps: str,
    samples: int,
    settings: Settings,
    reference_path: pathlib.Path | None = None,
    guidance: Guidance | None = None,
    dtype: str | None = None,
    tensor: int = 1,
    quiet: bool = False,
) -> dict[str, Any]:
    """Scores the generator's checkpoints; what is done is not done again.

    Args:
      steps: "all", or numbers with commas: "1000,2000". tensor: devices that share one copy of the generator.

    Writes out/step_<n>/ as `evaluate` does, out/steps.json, and best.json beside the checkpoints, so that a training that
    goes on keeps the best. Best is the lowest FID, or without a reference the highest Inception Score.
    Returns: {"steps": {n: numbers}, "best", "metric", "n", "remarks"}.
    Raises: ConfigError for a step that is not there; what `evaluate` raises.
    """
    folder = Workdir(workdir).checkpoints("generator")
    wanted = _wanted(folder, steps)
    mesh = make_mesh(MeshConfig(tensor=tensor))
    reference = read_reference(reference_path) if reference_path else None
    network = load_network(inception_path, mesh, settings)
    program = Program(network, mesh, settings, shift_of(reference))
    metric = "fid" if reference else "inception_score"
    numbers: dict[int, dict[str, float]] = {}
    remarks: list[str] = []
    for step in wanted:
        pipeline = load(workdir, mesh=mesh, dtype=dtype, step=step)
        result = evaluate(
            program, network, pipeline, out / f"step_{step}", images=samples, reference=reference, guidance=guidance,
            made_from=made_from(workdir, None, dtype, step), quiet=quiet, description=f"step {step}",
        )  # fmt: skip
        numbers[step] = {k: v for k, v in result.items() if isinstance(v, float) and k != "seconds"}
        remarks = result["remarks"]
    best = (min if reference else max)(wanted, key=lambda step: numbers[step][metric])
    name, value = f"evaluate/{metric}_n{samples}", numbers[best][metric]
    told = {"steps": numbers, "best": best, "metric": metric, "n": samples, "remarks": remarks}

    def write() -> None:
        known = best_steps(folder).get(name)
        # Of a few steps the best may be worse than the one that was marked before.
        if known is None or known["step"] in wanted or (value < known["value"]) == (reference is not None):
            mark_best(folder, best, name, value)
        write_json(out / "steps.json", told)

    from_main(write)
    return told


def _wanted(folder: Path, steps: str) -> list[int]:
    there: list[int] = from_main(lambda: [step for step, _ in good_steps(folder)])[::-1]
    require(bool(there), f"{folder} has no good checkpoint")
    if steps == "all":
        return there
    try:
        wanted = [int(word) for word in steps.split(",")]
    except ValueError:
        raise ConfigError(f"--steps {steps}: write all, or numbers with commas: 1000,2000") from None
    if missing := [step for step in wanted if step not in there]:
        raise ConfigError(f"--steps: {folder} has no good step {missing[0]}; it has {', '.join(map(str, there))}")
    return sorted(set(wanted))


def steps_table(told: dict[str, Any]) -> str:
    """A row a step; the best is marked."""
    names = list(next(iter(told["steps"].values())))
    lines = ["      step " + "".join(f"{name:>22}" for name in names)]
    for step, numbers in told["steps"].items():
        mark = " <- best" if step == told["best"] else ""
        lines.append(f"{step:10} " + "".join(f"{numbers[name]:22.4f}" for name in names) + mark)
    return "\n".join([*lines, f"n {told['n']}", *(f"note: {remark}" for remark in told["remarks"])])
