"""`engram-store inspect`: what a store is."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from engram_store.layout.inspect import StoreDescription


def inspect(
    directory: Annotated[Path, typer.Argument(help="Directory of a store.")],
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show what a store is: recipe, tables, snapshots, disk use."""
    import engram_store

    description = engram_store.inspect(directory)
    if json:
        from json import dumps

        from engram_store.layout.inspect import description_json

        typer.echo(dumps(description_json(description), indent=2))
    else:
        print_description(directory, description)


def print_description(directory: Path, description: "StoreDescription") -> None:
    """The same for people."""
    from rich.console import Console
    from rich.table import Table

    from engram_store.cli.output import plural, size_text

    console, metadata = Console(), description.metadata
    recipe, tables = metadata.recipe, description.tables
    disk = size_text(sum(table.disk_bytes for table in tables.values()))
    facts = Table.grid(padding=(0, 2))
    facts.add_row("store", str(directory), style="bold")
    facts.add_row("id", metadata.store_id)
    facts.add_row("fingerprint", metadata.fingerprint)
    orders = ", ".join(map(str, recipe.orders))
    facts.add_row(
        "recipe",
        f"{recipe.family}: n-grams of {orders}, {recipe.heads} heads each, "
        f"{recipe.vocabulary:,} distinct ids",
    )
    facts.add_row("step", f"{description.step:,} on disk")
    facts.add_row("snapshots", _steps(description.snapshots))
    facts.add_row("disk", disk)
    console.print(facts)

    columns = ("layer", "rows", "dim", "dtype", "optimizer", "base", "overlay", "disk")
    table = Table(*columns, box=None, header_style="bold", padding=(0, 2, 0, 0))
    for layer, spec in metadata.tables.items():
        files = tables[layer]
        table.add_row(
            str(layer),
            f"{spec.rows:,}",
            str(spec.dim),
            str(spec.dtype),
            str(spec.optimizer),
            f"g{files.generation:04d}",
            plural(files.segments, "segment"),
            size_text(files.disk_bytes),
        )
    console.print()
    console.print(table)


def _steps(steps: tuple[int, ...]) -> str:
    """All of a few, the newest of many."""
    if not steps:
        return "none"
    if len(steps) <= 8:
        return ", ".join(f"{step:,}" for step in steps)
    newest = ", ".join(f"{step:,}" for step in steps[-6:])
    return f"{len(steps):,}, the newest at {newest}"
