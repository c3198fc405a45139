"""Score several checkpoints of a work directory, and mark the best."""

from __future__ import annotations

import pathlib
from typing import Any

from rar_jax.config import require
from rar_jax.errors import ConfigError
from rar_jax.evaluation.program import Program
from rar_jax.evaluation.results import list_numbers
from rar_jax.evaluation.scores import score_samples
from rar_jax.parallel.processes import from_main
from rar_jax.runs.bucket import Path
from rar_jax.runs.checkpoint import best_steps, good_steps, mark_best
from rar_jax.runs.manifest import write_json
from rar_jax.runs.workdir import Workdir


def score_steps(
    program: Program,
    workdir: pathlib.Path,
    out: pathlib.Path,
    *,
    steps: str,
    samples: int,
    **how: Any,
) -> dict[str, Any]:
    """Score the generator's checkpoints; finished ones are not computed again.

    Writes the files of `score_samples` to out/step_<n>/, out/steps.json, and best.json beside the checkpoints, so that
    a resumed training keeps the best: the lowest FID or, without a reference, the highest Inception Score.

    steps: "all", or numbers with commas: "1000,2000". samples, how: as of `score_samples`.

    Returns: {"steps": {n: numbers}, "best", "metric", "n", "remarks"}.
    Raises: ConfigError for a step without a good checkpoint; as `score_samples`.
    """
    folder = Workdir(workdir).checkpoints("generator")
    wanted = _find_steps(folder, steps)
    reference = program.reference
    metric = "fid" if reference else "inception_score"
    how["samples"] = samples
    results = {step: score_samples(program, workdir, out / f"step_{step}", step=step, **how) for step in wanted}
    best = (min if reference else max)(wanted, key=lambda step: results[step][metric])
    name, value = f"evaluate/{metric}_n{samples}", results[best][metric]
    summary = {
        "steps": {step: list_numbers(result) for step, result in results.items()},
        "best": best,
        "metric": metric,
        "n": samples,
        "remarks": results[wanted[-1]]["remarks"],
    }

    def write() -> None:
        known = best_steps(folder).get(name)
        # The best of a few steps may be worse than the one that was marked before.
        if known is None or known["step"] in wanted or (value < known["value"]) == (reference is not None):
            mark_best(folder, best, name, value)
        write_json(out / "steps.json", summary)

    from_main(write)
    return summary


def _find_steps(folder: Path, steps: str) -> list[int]:
    good: list[int] = from_main(lambda: [step for step, _ in good_steps(folder)])[::-1]
    require(bool(good), f"{folder} has no good checkpoint")
    if steps == "all":
        return good
    try:
        wanted = [int(word) for word in steps.split(",")]
    except ValueError:
        raise ConfigError(f"--steps {steps}: write all, or numbers with commas: 1000,2000") from None
    if missing := [step for step in wanted if step not in good]:
        raise ConfigError(f"--steps: {folder} has no good step {missing[0]}; it has {', '.join(map(str, good))}")
    return sorted(set(wanted))
