"""List systems with their released files, sizes, published scores and licences."""

from __future__ import annotations

from collections.abc import Iterator

from rar_jax.weights.registry import list_released, list_systems

COLUMNS = ("name", "system", "parameters", "published score", "scored with", "file", "licence")


def print_models(*, markdown: bool, quiet: bool) -> None:
    """Print the table of all released files; with `markdown`, as the README has it."""
    rows = [COLUMNS, *list_rows(markdown)]
    if markdown:
        print("\n".join("| " + " | ".join(row) + " |" for row in (COLUMNS, ("---",) * len(COLUMNS), *rows[1:])))
        return
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    print("\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows))
    facts = {name: getattr(module, "FORMAT", None) for name, (_, module) in list_systems().items()}
    told = "; ".join(f"{name}: {', '.join(form.facts)}" for name, form in facts.items() if form and form.facts)
    if not quiet:
        print(f"\nWhat files of other sizes do not tell (--fact NAME=VALUE): {told}")


def list_rows(markdown: bool = False) -> Iterator[tuple[str, ...]]:
    """Yield the columns of each released file; `markdown` makes links."""
    for name, (system, file) in list_released().items():
        form = getattr(list_systems()[system][1], "FORMAT", None)
        size = f"{form.count_parameters(file.config) / 1e6:.1f} M" if form else ""
        score = ", ".join(f"{key} {value:.{1 if value > 100 else 2}f}" for key, value in file.scores.items())
        sampling = ", ".join(f"{key} {value:g}" for key, value in file.sampling.items())
        resize = f"resized to {file.resize}" if file.resize else None
        protocol = "; ".join(text for text in (sampling, resize, file.rounding, file.labels) if text)
        yield name, system, size, score, protocol, f"[{file.file}]({file.url})" if markdown else file.url, file.licence
