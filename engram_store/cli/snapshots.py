"""`engram-store snapshot`, `snapshots`, `restore` and `fold`: look after a store.

One that is in use is reached through its process, by URL.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from engram_store.cli.remote import StoreName, Target, TlsCa, TlsCert, TlsKey, connected

if TYPE_CHECKING:
    from engram_store.layout.usage import SnapshotInfo

Snapshot = Annotated[
    str,
    typer.Argument(
        metavar="STEP|NAME",
        help="Step of a snapshot, the name of a pin, or newest.",
        show_default=False,
    ),
]


def snapshot(
    directory: Target,
    pin: Annotated[
        str | None, typer.Option("--pin", metavar="NAME", help="Pin it under this name.")
    ] = None,
    store: StoreName = "",
    tls_ca: TlsCa = None,
    tls_cert: TlsCert = None,
    tls_key: TlsKey = None,
) -> None:
    """Keep the tables as they are now; one that is being trained goes on."""
    process = connected(directory, tls_ca, tls_cert, tls_key, store)
    if process is not None:
        with process:
            ref = process.snapshot(store, pin=pin)
    else:
        import engram_store
        from engram_store import snapshots as store_snapshots
        from engram_store.layout.pins import check_pin_name

        if pin is not None:
            check_pin_name(pin)
        with engram_store.open(directory, "train") as opened:
            ref = opened.snapshot()
            if pin is not None:
                store_snapshots.pin(directory, ref, pin)
    named = "" if pin is None else f", pinned as {pin}"
    typer.echo(f"Snapshot at step {ref.step:,}{named}: {ref.digest}")


def snapshots(
    directory: Target,
    store: StoreName = "",
    tls_ca: TlsCa = None,
    tls_cert: TlsCert = None,
    tls_key: TlsKey = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List the snapshots: when they were made, their pins, and the disk that they hold."""
    process = connected(directory, tls_ca, tls_cert, tls_key, store)
    if process is not None:
        with process:
            found = process.describe_snapshots(store)
    else:
        from engram_store.snapshots import describe

        found = describe(directory)
    if json:
        from json import dumps

        typer.echo(dumps([info.to_json() for info in found], indent=2))
        return
    _print(found)


def _print(found: "list[SnapshotInfo]") -> None:
    """One line for each; what is wrong with some comes after them."""
    from rich.console import Console
    from rich.table import Table

    from engram_store.cli.output import size_text

    columns = ("step", "made (UTC)", "base", "segments", "own", "shared", "digest", "pins")
    table = Table(box=None, header_style="bold", padding=(0, 2, 0, 0))
    for column in columns:
        table.add_column(column, no_wrap=column != "pins")
    for info in found:
        table.add_row(
            f"{info.step:,}",
            info.made[:16].replace("T", " "),
            ",".join(sorted({f"g{number:04d}" for number in info.generations.values()})),
            f"{sum(info.segments.values()):,}",
            size_text(info.own_bytes),
            size_text(info.shared_bytes),
            info.digest[:8],
            ", ".join(info.pins),
        )
    console = Console()
    console.print(table)
    console.print(
        "own: what removing this one alone would free; shared: also in other snapshots, the "
        "present tables, or an export",
        style="dim",
    )
    for info in found:
        if info.problem:
            typer.echo(f"the snapshot at step {info.step:,} cannot be used: {info.problem}")


def restore(
    directory: Target,
    step: Snapshot,
    to: Annotated[
        Path | None,
        typer.Option(
            metavar="NEWDIR",
            help="Leave the store as it is, and make a new one there (as `export` does).",
        ),
    ] = None,
    store: StoreName = "",
    tls_ca: TlsCa = None,
    tls_cert: TlsCert = None,
    tls_key: TlsKey = None,
) -> None:
    """Go back to a snapshot; everything newer is forgotten, unless --to makes a new store.

    Works too where damage keeps the store from being opened as it is.
    """
    from engram_store.layout.pins import snapshot_name

    wanted = snapshot_name(step)
    process = connected(directory, tls_ca, tls_cert, tls_key, store)
    if to is not None:
        if process is not None:
            from engram_store.errors import ConfigError

            process.close()
            raise ConfigError(
                f"--to makes a directory on the store's own host; name the store's directory "
                f"there instead of {directory}; its process may go on"
            )
        from engram_store.cli.export import make_export

        make_export(directory, step, to, copy=False)
        return
    if process is not None:
        with process:
            at = process.restore(wanted, store)
        typer.echo(f"At step {at:,} again.")
        return
    from engram_store.engine.rewind import rewind
    from engram_store.layout.disk import Disk
    from engram_store.layout.manifest import read_manifest
    from engram_store.layout.metadata import read_metadata
    from engram_store.layout.paths import StorePaths

    paths = StorePaths(Path(directory))
    problem = rewind(paths, read_metadata(paths), wanted, Disk())
    if problem is not None:
        typer.echo(f"The working manifest was of no use: {problem}", err=True)
    typer.echo(f"At step {read_manifest(paths)[0].step:,} again; everything newer is forgotten.")


def fold(
    directory: Target,
    store: StoreName = "",
    tls_ca: TlsCa = None,
    tls_cert: TlsCert = None,
    tls_key: TlsKey = None,
) -> None:
    """Write all segments into the base tables now."""
    process = connected(directory, tls_ca, tls_cert, tls_key, store)
    typer.echo(f"Folding {directory} ...")
    if process is not None:
        with process:
            process.fold(store)
        typer.echo("Folded.")
        return
    import engram_store
    from engram_store.cli.output import size_text

    with engram_store.open(directory, mode="train") as opened:
        opened.fold()
        written = opened.stats().bytes_written
    typer.echo(f"Folded; {size_text(written)} written.")
