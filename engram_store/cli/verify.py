"""`engram-store verify`: is every byte of a store what was written?"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from engram_store.layout.verify import VerifyReport


def verify(
    directory: Annotated[Path, typer.Argument(help="Directory of a store.")],
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Check all files of a store against their checksums; it may be in use.

    Exit code 1: something is damaged.
    """
    from engram_store.cli.progress import byte_progress
    from engram_store.layout.paths import StorePaths
    from engram_store.layout.verify import verify_store

    with byte_progress("Checking") as progress:
        report = verify_store(StorePaths(directory), progress=progress)
    if json:
        from json import dumps

        typer.echo(dumps(report.to_json(), indent=2))
    else:
        _print(report)
    if not report.ok:
        raise typer.Exit(1)


def _print(report: "VerifyReport") -> None:
    """One line that sums up, then every damage with what to do, then the notes."""
    from engram_store.cli.output import plural, size_text

    found = plural(len(report.damages), "damage") if report.damages else "no damage"
    typer.echo(
        f"{plural(report.files, 'file')}, {size_text(report.read_bytes)} in {report.seconds:.1f} s "
        f"({report.bytes_per_second / 1e9:.1f} GB/s): {found}"
    )
    for damage in report.damages:
        typer.echo(f"damage: {damage.where}")
        typer.echo(f"  {damage.problem}")
        if damage.needed_by:
            typer.echo(f"  needed by {damage.needed_by}")
        typer.echo(f"  {report.advice(damage)}")
    for note in report.notes:
        typer.echo(f"note: {note}")
