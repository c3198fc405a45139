"""Compiles the released models for slices of TPUs and writes docs/topologies.md (see there).

    python docs/measurements/topologies.py              compiles what topologies.json lacks (minutes each), writes the page
    python docs/measurements/topologies.py --page       writes the page from topologies.json
    python docs/measurements/topologies.py --only rar_b_v5e-16      compiles these, whether they are there or not

It needs `pip install -e '.[tpu]'` and no TPU. Killed, it goes on where it was.
"""

import argparse
import contextlib
import fcntl
import itertools
import json
import pathlib
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

HERE = pathlib.Path(__file__).parent
STORE, TRIED, PAGE = HERE / "topologies.json", HERE / "topologies_tried.json", HERE.parent / "topologies.md"
GUIDE = HERE.parent / "imagenet.md"  # which has some of the rows between two comments
MODELS = {"rar_b": "RAR-B", "rar_l": "RAR-L", "rar_xl": "RAR-XL", "rar_xxl": "RAR-XXL"}
SLICES = {"v5e-16": "v5e:4x4", "v5e-64": "v5e:8x8", "v5e-256": "v5e:16x16", "v5p-64": "v5p:4x4x4", "v6e-64": "v6e:8x8"}
PODS = ("v5e-64", "v5p-64", "v6e-64")  # those of the guide
SCALING = {16: "v5p:2x2x4", 64: "v5p:4x4x4", 256: "v5p:4x8x8", 1024: "v5p:8x8x16"}
BATCH = 2048
CROPS = 10  # of each image, in the paper's recipe
Rows = dict[str, dict[str, Any]]


def cells() -> dict[str, tuple[str, str, int, int]]:
    """Name of each compile: experiment, topology, slices, batch size."""
    found = {f"{model}_{name}": (model, slice_, 1, BATCH) for model in MODELS for name, slice_ in SLICES.items()}
    for chips, slice_ in SCALING.items():
        if chips != 64:  # that is rar_xxl_v5p-64
            found[f"strong_{chips}"] = ("rar_xxl", slice_, 1, BATCH)
            found[f"weak_{chips}"] = ("rar_xxl", slice_, 1, BATCH // 64 * chips)
    found |= {f"tokenize_{name}": ("rar_b", SLICES[name], 1, BATCH) for name in PODS}  # all models have one tokenizer
    found |= {f"sample_{model}": (model, SLICES["v5p-64"], 1, BATCH) for model in MODELS}
    return {**found, "slices_2": ("rar_b", "v5e:4x4", 2, BATCH)}


def order() -> list[str]:
    """Names of all compiles. Scaling comes first. Of the others chips with much memory do: what does not fit there need not be tried on smaller ones."""
    first = ["strong_256", "weak_16", "weak_256", "slices_2", "strong_1024", "weak_1024"]
    rest = sorted(
        set(cells()) - set(first),
        key=lambda name: (part_of(name) != "train", "v5p" not in cells()[name][1], "v5e-16" in name, name),
    )
    return [*first, *rest]


def part_of(name: str) -> str:
    """Of `plan`: "train", "tokenize" or "sample"."""
    part = name.split("_")[0]
    return part if part in ("tokenize", "sample") else "train"


def attempts(name: str) -> Iterator[tuple[list[str], Any, Any]]:
    """Flags, the experiment with them, and the topology: as the file is, then, of training, each remedy."""
    from rar_jax.config import load_experiment
    from rar_jax.experiment import resolve
    from rar_jax.tools.plan.plan import list_remedies
    from rar_jax.tools.plan.topology import parse_topology

    model, slice_, slices, batch = cells()[name]
    experiment = resolve(load_experiment(model, [f"train.batch_size={batch}"]), model)
    topology = parse_topology(slice_, slices)
    yield [], experiment, topology
    if part_of(name) != "train":
        return
    for flags, changed in list_remedies(experiment, topology.chips):
        yield flags, changed, topology


def compile_one(name: str, place: int) -> dict[str, Any]:
    """What `rar-jax plan` says of one attempt at a cell."""
    import jax

    from rar_jax.errors import ConfigError
    from rar_jax.tools.plan.plan import plan_experiment
    from rar_jax.tools.plan.topology import find_topology_devices

    jax.config.update("jax_platforms", "cpu")
    _, experiment, topology = next(itertools.islice(attempts(name), place, None))
    find_topology_devices(topology)  # what is wrong without it is no property of the experiment
    try:
        return plan_experiment(
            experiment, topology, parts=(part_of(name),), remedies=False, say=lambda t: print(t, file=sys.stderr)
        )
    except ConfigError as error:  # a width that does not divide
        return {"train": {"fits": False, "why": str(error)}}


def compile_cell(
    name: str, store: Rows, tried: dict[str, str], limit: float, lock: pathlib.Path | None
) -> dict[str, Any]:
    """A row of the store: of the first attempt that fits. Each compile is a process of its own, so that one that hangs can be
    given up, alone on the machine under `lock`. `tried` has why an attempt did not fit; it is added to. What a row of the store shows to be too large is not compiled.

    Raises: subprocess.TimeoutExpired for a compile that takes longer than `limit`; what came before stays in `tried`.
    """
    chips, versions = 0, {}
    for place, (flags, changed, topology) in enumerate(attempts(name)):
        chips = topology.chips
        said = " ".join(flags) or "as it is"
        rows = changed.train.batch_size / changed.train.accumulation / topology.chips
        remat, fsdp = changed.generator.config.remat, changed.mesh.fsdp
        shape = {"model": cells()[name][0], "remat": remat, "fsdp": fsdp, "rows": rows}
        larger = part_of(name) == "train" and too_large(shape, topology.chip.memory, store)
        if why := tried.get(said) or (larger and f"too large, by {larger}"):
            print(f"{name}, {said}: {why}", flush=True)
            continue
        command = [sys.executable, __file__, "--one", name, str(place)]
        with _locked(lock):
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=limit, check=True)
        report = json.loads(done.stdout)
        told, versions = report[part_of(name)], report.get("versions", versions)
        if told["fits"]:
            kept = {k: v for k, v in told.items() if k not in ("fits", "steps")}
            if part_of(name) != "train":
                return {"chips": chips, "fits": True, "versions": versions, **kept}
            head = {"chips": chips, "fits": not flags, "flags": flags, "shape": shape}
            return {**head, "mesh": report["mesh"], "versions": versions, **kept}
        tried[said] = told["why"]
        print(f"{name}, {said}: {told['why']}", flush=True)
        TRIED.write_text(json.dumps({**_read(TRIED), name: tried}, indent=1) + "\n")
    return {"chips": chips, "fits": False, "versions": versions}


def too_large(shape: dict[str, Any], available: float, store: Rows) -> str | None:
    """The row that says so: the same on as many rows a chip, or fewer, took more than there is, by a seventh at least, since
    chips of two kinds do not take quite the same."""
    for name, row in store.items():
        same = "shape" in row and {**row["shape"], "rows": 0} == {**shape, "rows": 0}
        if same and row["shape"]["rows"] <= shape["rows"] and row["memory"]["peak"] > 1.15 * available:
            return name
    return None


# ---------------------------------------------------------------- the page


def page(rows: Rows) -> str:
    """Markdown of all that is there; a cell that has not been compiled yet is a dash."""
    versions = sorted(
        {" ".join(f"{k} {v}" for k, v in sorted(row["versions"].items())) for row in rows.values() if row["versions"]}
    )
    lines = [HEAD.format(versions="; ".join(versions))]
    lines += [
        "| model | slice | fits? | GiB a chip | s a step | of it wire | MFU | images/s | days | chip-hours | compiled in, s |",
        "|" + "---|" * 11,
    ]
    for model, title in MODELS.items():
        for name in SLICES:
            lines.append(f"| {title} | {name} | {_cells(rows.get(f'{model}_{name}'))} |")
    if any(f"sample_{model}" in rows for model in MODELS):
        lines += [
            _SAMPLING,
            "| model | GiB a chip | s a batch | images/s | minutes | chip-hours | compiled in, s |",
            "|" + "---|" * 7,
        ]
        lines += [f"| {title} | {_sampled(rows.get(f'sample_{model}'))} |" for model, title in MODELS.items()]
    lines += [
        _SCALING,
        "| chips | batch | s a step | efficiency | a chip sends | wire, s | beside other work, s |",
        "|" + "---|" * 7,
    ]
    for kind in ("strong", "weak"):
        lines.append(f"| **{kind}** | | | | | | |")
        base = rows.get(f"{kind}_16")
        for chips in SCALING:
            row = rows.get("rar_xxl_v5p-64" if chips == 64 else f"{kind}_{chips}")
            lines.append(
                f"| {chips} | {BATCH if kind == 'strong' else BATCH // 64 * chips} | {_scaled(row, base, kind)} |"
            )
    if (base := rows.get("strong_16")) and (most := rows.get("strong_256")):
        lines += ["", _why(base, most)]
    if two := rows.get("slices_2"):
        lines += [
            "",
            f"Two slices of v5e-16 with RAR-B, copies over the data centre's network: {two['seconds']['all']:.3f} s a step, of which "
            f"{two['seconds']['exposed']:.3f} s are wire. Within its slice a chip sends {_sent(two, 'sent_bytes') / 1e6:.0f} MB, to the "
            f"other {_sent(two, 'network_bytes') / 1e6:.0f} MB, all of which is taken to be waited for.",
        ]
    return "\n".join(lines) + "\n"


def costs(rows: Rows) -> str:
    """Tables of the guide to ImageNet: days and chip-hours of the whole training, of what fits; minutes and chip-hours of the rest."""
    lines = ["| | chips | flags | days | chip-hours, so dollars at 1 dollar a chip-hour |", "|" + "---|" * 5]
    for model, title in MODELS.items():
        for name in PODS:
            row = rows.get(f"{model}_{name}", {})
            if "days" in row:
                flags = " ".join(f"`{flag}`" for flag in row["flags"])
                lines.append(f"| {title} | {name} | {flags} | {row['days']:.1f} | {row['chip_hours']:,.0f} |")
    lines += ["", "| what comes on top | chips | images/s | minutes | chip-hours |", "|" + "---|" * 5]
    lines += [
        f"| tokens of ten crops of 1,281,167 images | {name} | {_timed(rows.get(f'tokenize_{name}'), CROPS)} |"
        for name in PODS
    ]
    lines += [
        f"| 50,000 samples and their FID, {title} | v5p-64 | {_timed(rows.get(f'sample_{model}'), 1)} |"
        for model, title in MODELS.items()
        if f"sample_{model}" in rows
    ]
    return "\n".join(lines)


def write(rows: Rows) -> None:
    """The page, and the guide's rows."""
    PAGE.write_text(page(rows))
    before, rest = GUIDE.read_text().split(COSTS[0])
    GUIDE.write_text(f"{before}{COSTS[0]}\n\n{costs(rows)}\n\n{COSTS[1]}{rest.split(COSTS[1])[1]}")


COSTS = "<!-- rows by docs/measurements/topologies.py -->", "<!-- end of rows -->"


def _why(base: dict[str, Any], most: dict[str, Any]) -> str:
    """What keeps a step on more chips from being as much shorter."""
    ideal = base["seconds"]["computing"] * base["chips"] / most["chips"]
    return (
        f"Strong scaling to {most['chips']} chips: of {most['seconds']['all']:.3f} s {ideal:.3f} s are the work of {base['chips']} chips shared out. "
        f"{most['seconds']['exposed']:.3f} s are wire: a chip sends {_sent(most, 'sent_bytes') / 1e9:.1f} GB, weights and gradients, "
        f"however few images it has. The other {most['seconds']['computing'] - ideal:.3f} s are computing that "
        f"{BATCH // most['chips']} images a chip do not fill."
    )


def _sent(row: dict[str, Any], name: str) -> float:
    """Bytes of a chip in one step."""
    return sum(one[name] for one in row["collectives"].values())


def _cells(row: dict[str, Any] | None) -> str:
    if row is None:
        return " | ".join(["-"] * 9)
    if "days" not in row:
        return "no: nothing tried fits" + " | -" * 8
    flags = [flag.removeprefix("--config.").split(".", 1)[1] for flag in row["flags"]]
    fits = "yes" if row["fits"] else "with " + ", ".join(flags)
    seconds = row["seconds"]
    numbers = f"{_gib(row['memory'])} | {seconds['all']:.3f} | {seconds['exposed']:.3f}"
    return f"{fits} | {numbers} | {row['mfu']:.1%} | {row['images_per_second']:,.0f} | {row['days']:.1f} | {row['chip_hours']:,.0f} | {row['compile_seconds']:.0f}"


def _sampled(row: dict[str, Any] | None) -> str:
    if row is None or "minutes" not in row:
        return " | ".join(["-"] * 6)
    return f"{_gib(row['memory'])} | {row['seconds']['all']:.2f} | {_timed(row, 1)} | {row['compile_seconds']:.0f}"


def _timed(row: dict[str, Any] | None, times: int) -> str:
    """images/s, minutes, chip-hours of so many times what the row is of."""
    if row is None or "minutes" not in row:
        return " | ".join("---")
    minutes = row["minutes"] * times
    return f"{row['images_per_second']:,.0f} | {minutes:.1f} | {minutes / 60 * row['chips']:.1f}"


def _gib(memory: dict[str, float]) -> str:
    return f"{memory['peak'] / 2**30:.1f} of {memory['available'] / 2**30:.1f}"


def _scaled(row: dict[str, Any] | None, base: dict[str, Any] | None, kind: str) -> str:
    if row is None or "days" not in row:
        return " | ".join(["-"] * 5)
    seconds, efficiency = row["seconds"], "-"
    if base is not None and "days" in base:
        expected = base["seconds"]["all"] * (base["chips"] / row["chips"] if kind == "strong" else 1)
        efficiency = f"{expected / seconds['all']:.0%}"
    return f"{seconds['all']:.3f} | {efficiency} | {_sent(row, 'sent_bytes') / 1e9:.2f} GB | {seconds['exposed']:.3f} | {seconds['overlapped']:.3f}"


HEAD = """# What fits where, and how long it takes

Made by `python docs/measurements/topologies.py` with {versions}: each row is the real training step of
`experiments/<model>.py`, compiled by TPU's own compiler without a TPU. **No TPU has been measured**: seconds are the compiler's
own cycles by the clock of the matmul units, loops multiplied out, plus bytes on the wire over the links' bandwidth where the
compiler lets nothing run beside them; latency, the input pipeline, checkpoints and evaluations are not in them. MFU counts
model FLOPs: nothing recomputed, of the attention only what the mask leaves. "fits" is yes for the file as it is; otherwise the
first change found to make it fit, which is what the numbers are of. Global batch 2048, 250,000 steps (400 epochs).
`rar-jax plan --config rar_xxl --topology v5p:4x4x4` prints one row in full; a dash has not been compiled.

What the seconds can be trusted for: by these cycles the large matmuls run at 93 to 96 % of the chip's peak, on v5e and on v5p.
Why MFU is low: the attention's own products, of 16 heads of 48 to 88, run at 2 % of the peak on v5e and move their scores through
memory. Of RAR-B's cycles on v5e-16 attention without its projections has 48 % and copies have 12 %, of RAR-XXL's on v5p-64 28 % and
10 %. A fused kernel is what would change that. Tried, one layer of RAR-XXL's attention (32 rows, 16 heads of 88, forward and backward)
on v5e: 7.22 ms by the compiler's cycles as it is, 7.21 ms without dropout. JAX's flash attention for TPUs compiles, but takes no
dropout, which is part of the recipe, wants its 257 slots padded to 384, and what stands around its kernels (padding, transposing)
has 6.58 ms; the kernels' own cycles the compiler does not say. So it is left as it is.
"""
_SAMPLING = """
## 50,000 samples and their FID on v5p-64

The program that `rar-jax evaluate` runs, 16 images a chip at a time: tokens with guidance, decoding, Inception and its sums, in
float32 as the scores are defined. A matmul of float32 is six of bfloat16 on a TPU. Seconds to compile are of two cores, with
other work beside them (RAR-B's were paused for three minutes); most of them go into the convolutions of the decoder and of Inception.
"""
_SCALING = """
## Scaling of RAR-XXL on v5p

Mesh data x fsdp 4. Strong: batch 2048 on more chips. Weak: 32 images a chip. Efficiency is against 16 chips by the same estimate.
"""


@contextlib.contextmanager
def _locked(path: pathlib.Path | None) -> Iterator[None]:
    """Alone on this machine, where others measure on it, who then have 30 s to come in."""
    if path is None:
        yield
        return
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
    time.sleep(30)


def _read(path: pathlib.Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.exists() else {}


if __name__ == "__main__":
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--page", action="store_true", help="compile nothing")
    flags.add_argument("--only", nargs="+", choices=tuple(cells()), help="compile these")
    flags.add_argument(
        "--lock", type=pathlib.Path, help="a file to lock while compiling, let go of for 30 s after each"
    )
    flags.add_argument(
        "--limit", type=float, default=280, help="seconds after which a compile is given up (default 280)"
    )
    flags.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    args = flags.parse_args()
    if args.one:
        print(json.dumps(compile_one(args.one[0], int(args.one[1]))))
        raise SystemExit
    store = _read(STORE)
    for name in [] if args.page else [name for name in args.only or order() if args.only or name not in store]:
        tried = {} if args.only else _read(TRIED).get(name, {})
        print(name, flush=True)
        try:
            store[name] = compile_cell(name, store, tried, args.limit, args.lock)
        except (subprocess.TimeoutExpired, subprocess.CalledProcessError) as error:
            print(f"{name}: {error}", file=sys.stderr, flush=True)
            continue
        STORE.write_text(json.dumps(store, indent=1) + "\n")
        TRIED.write_text(json.dumps({k: v for k, v in _read(TRIED).items() if k != name}, indent=1) + "\n")
        write(store)
    write(store)
