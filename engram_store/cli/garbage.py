"""`engram-store gc`: remove older snapshots, and files that nothing needs."""

from typing import TYPE_CHECKING, Annotated

import typer

from engram_store.cli.remote import StoreName, Target, TlsCa, TlsCert, TlsKey, connected

if TYPE_CHECKING:
    from engram_store.engine.garbage import GarbageReport


def gc(
    directory: Target,
    keep: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="How many of the newest snapshots stay, beside the pinned. Default: all.",
        ),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only tell what would go.")] = False,
    store: StoreName = "",
    tls_ca: TlsCa = None,
    tls_cert: TlsCert = None,
    tls_key: TlsKey = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Remove older snapshots, and files that neither a snapshot nor the store needs.

    Checkpoints that name a removed snapshot are of no use any more: pin those to keep.
    """
    process = connected(directory, tls_ca, tls_cert, tls_key, store)
    if process is not None:
        with process:
            report = process.collect_garbage(keep, store, dry_run=dry_run)
    else:
        from engram_store import snapshots

        report = snapshots.collect_garbage(directory, keep, dry_run=dry_run)
    if json:
        from json import dumps

        typer.echo(dumps(report.to_json(), indent=2))
        return
    _print(report)


def _print(report: "GarbageReport") -> None:
    from engram_store.cli.output import plural, size_text

    would = "would be " if report.dry_run else ""
    steps = f" (steps {', '.join(f'{s:,}' for s in report.removed)})" if report.removed else ""
    typer.echo(
        f"{plural(len(report.removed), 'snapshot')}{steps} and "
        f"{len(report.directories):,} base generations and segments {would}removed: "
        f"{size_text(report.freed_bytes)}"
    )
    for directory in report.directories:
        typer.echo(f"  {directory}")
    for step, names in report.pinned.items():
        typer.echo(f"step {step:,} stays: pinned as {', '.join(names)}")
    for step in report.in_use:
        typer.echo(f"step {step:,} stays: it is being read, by an export for instance")
    typer.echo(f"{plural(len(report.kept), 'snapshot')} left.")
