"""`engram-store conformance`: check the golden vectors."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from engram_store.conformance import Report


def conformance(
    directory: Annotated[Path, typer.Argument(help="Directory of vector files.")],
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Check that this installation computes what the published models compute.

    Exit code 1: something differs; 2: there is nothing to check.
    """
    from engram_store.conformance import run

    report = run(directory)
    if json:
        from json import dumps

        typer.echo(dumps(report.to_json(), indent=2))
    else:
        _print(report)
    if not report.ok:
        raise typer.Exit(1)


def _print(report: "Report") -> None:
    """One line per kind, then every miss."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table("kind", "passed", "")
    for kind, tally in report.kinds.items():
        mark = "[green]ok[/]" if tally.passed == tally.total else "[red]differs[/]"
        table.add_row(kind, f"{tally.passed:,} of {tally.total:,}", mark)
    for kind, reason in report.not_checked.items():
        table.add_row(kind, "", f"[yellow]not checked: {escape(reason)}[/]")
    console = Console()
    console.print(table)
    for miss in report.misses:
        console.print(f"[red]miss[/] {escape(f'{miss.file}: {miss.what}: {miss.detail}')}")
