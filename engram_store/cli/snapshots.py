"""`engram-store snapshots`, `restore` and `fold`: look after a store that is not in use."""

from pathlib import Path
from typing import Annotated

import typer

_Directory = Annotated[Path, typer.Argument(help="Directory of a store.")]


def snapshots(directory: _Directory) -> None:
    """List the steps that have a snapshot, one per line."""
    import engram_store

    for step in engram_store.inspect(directory).snapshots:
        typer.echo(str(step))


def restore(
    directory: _Directory, step: Annotated[int, typer.Argument(help="Step of a snapshot.")]
) -> None:
    """Go back to a snapshot; everything newer is forgotten."""
    import engram_store

    typer.echo(f"Opening {directory} ...")
    with engram_store.open(directory, mode="train") as store:
        before = store.step
        store.restore(step)
    typer.echo(f"At step {step:,} again; {before - step:,} steps are forgotten.")


def fold(directory: _Directory) -> None:
    """Write all segments into the base tables now."""
    import engram_store
    from engram_store.cli.output import size_text

    typer.echo(f"Folding {directory} ...")
    with engram_store.open(directory, mode="train") as store:
        store.fold()
        written = store.stats().bytes_written
    typer.echo(f"Folded; {size_text(written)} written.")
