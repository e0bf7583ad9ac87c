"""`engram-store stores`: what a process serves."""

from typing import Annotated

import typer

from engram_store.cli.remote import TlsCa, TlsCert, TlsKey, Url, connected


def stores(
    url: Url,
    tls_ca: TlsCa = None,
    tls_cert: TlsCert = None,
    tls_key: TlsKey = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List the stores that a process serves, and who is connected to them."""
    process = connected(url, tls_ca, tls_cert, tls_key)
    if process is None:
        from engram_store.errors import ConfigError

        raise ConfigError(
            f"{url!r} is no URL of a store process; give unix:///path/of/socket or tcp://host:port"
        )
    with process:
        found = process.list_stores()
    if json:
        from dataclasses import asdict
        from json import dumps

        typer.echo(dumps([asdict(entry) for entry in found], indent=2))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table("store", "step", "trainers", "readers", "id", box=None, header_style="bold")
    for entry in found:
        counts = (entry.step, entry.trainers, entry.readers)
        table.add_row(entry.name, *(f"{count:,}" for count in counts), entry.store_id)
    Console().print(table)
