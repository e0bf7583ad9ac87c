"""`engram-store export`: a snapshot becomes a store of its own."""

from pathlib import Path
from typing import Annotated

import typer

from engram_store.cli.snapshots import Snapshot


def export(
    directory: Annotated[Path, typer.Argument(help="Directory of a store.", show_default=False)],
    step: Snapshot,
    target: Annotated[Path, typer.Argument(help="Directory to make.", show_default=False)],
    copy: Annotated[
        bool, typer.Option("--copy", help="Share no file with the store, as a backup should.")
    ] = False,
) -> None:
    """Make a new, independent store of a snapshot; the store may be trained meanwhile."""
    make_export(directory, step, target, copy=copy)


def make_export(directory: Path | str, step: str, target: Path, *, copy: bool) -> None:
    """Do it, and tell what was made."""
    from engram_store import snapshots
    from engram_store.cli.output import plural
    from engram_store.cli.progress import byte_progress
    from engram_store.layout.pins import snapshot_name

    wanted = snapshot_name(step)
    with byte_progress("Exporting") as progress:
        made = snapshots.export(directory, wanted, target, copy=copy, progress=progress)
    files = f"{plural(made.copied, 'file')} copied, {made.linked:,} shared with {directory}"
    typer.echo(
        f"Store {made.snapshot.store_id} at step {made.snapshot.step:,} in {target}; {files}"
    )
