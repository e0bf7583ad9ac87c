"""`engram-store pin` and `unpin`: names that keep snapshots from being removed."""

from typing import Annotated

import typer

from engram_store.cli.remote import StoreName, Target, TlsCa, TlsCert, TlsKey, connected
from engram_store.cli.snapshots import Snapshot


def pin(
    directory: Target,
    step: Snapshot,
    name: Annotated[
        str,
        typer.Argument(
            help="Letters, digits, dots, dashes and underscores; a letter first.",
            show_default=False,
        ),
    ],
    move: Annotated[
        bool, typer.Option("--move", help="Take the name from the snapshot that has it now.")
    ] = False,
    store: StoreName = "",
    tls_ca: TlsCa = None,
    tls_cert: TlsCert = None,
    tls_key: TlsKey = None,
) -> None:
    """Keep a snapshot from being removed, and give it a name; the store may be in use."""
    from engram_store.layout.pins import snapshot_name

    wanted = snapshot_name(step)
    process = connected(directory, tls_ca, tls_cert, tls_key, store)
    if process is not None:
        with process:
            ref = process.pin(wanted, name, store, move=move)
    else:
        from engram_store import snapshots

        ref = snapshots.pin(directory, wanted, name, move=move)
    typer.echo(f"{name}: the snapshot at step {ref.step:,}.")


def unpin(
    directory: Target,
    name: Annotated[str, typer.Argument(help="Name of a pin.", show_default=False)],
    store: StoreName = "",
    tls_ca: TlsCa = None,
    tls_cert: TlsCert = None,
    tls_key: TlsKey = None,
) -> None:
    """Take a name away; the snapshot stays until something removes it."""
    process = connected(directory, tls_ca, tls_cert, tls_key, store)
    if process is not None:
        with process:
            process.unpin(name, store)
    else:
        from engram_store import snapshots

        snapshots.unpin(directory, name)
    typer.echo(f"{name} is no pin any more.")
