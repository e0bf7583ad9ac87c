"""`engram-store inspect`: what a store is."""

from typing import Annotated, Any

import typer

from engram_store.cli.remote import StoreName, Target, TlsCa, TlsCert, TlsKey, connected


def inspect(
    directory: Target,
    store: StoreName = "",
    tls_ca: TlsCa = None,
    tls_cert: TlsCert = None,
    tls_key: TlsKey = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show what a store is: recipe, tables, snapshots, disk use."""
    process = connected(directory, tls_ca, tls_cert, tls_key, store)
    if process is not None:
        with process:
            description = process.inspect(store)
    else:
        import engram_store
        from engram_store.layout.inspect import description_json

        description = description_json(engram_store.inspect(directory))
    if json:
        from json import dumps

        typer.echo(dumps(description, indent=2))
    else:
        print_description(directory, description)


def print_description(where: str, description: dict[str, Any]) -> None:
    """What `description_json` tells, for people."""
    from rich.console import Console
    from rich.table import Table

    from engram_store.cli.output import plural, size_text

    console, recipe = Console(), description["recipe"]
    facts = Table.grid(padding=(0, 2))
    facts.add_row("store", where, style="bold")
    facts.add_row("id", description["store_id"])
    facts.add_row("fingerprint", description["fingerprint"])
    orders = ", ".join(map(str, recipe["orders"]))
    facts.add_row(
        "recipe",
        f"{recipe['family']}: n-grams of {orders}, {recipe['heads']} heads each, "
        f"{recipe['vocabulary']:,} distinct ids",
    )
    facts.add_row("step", f"{description['step']:,} on disk")
    facts.add_row("snapshots", _steps(description["snapshots"]))
    facts.add_row("disk", size_text(description["disk_bytes"]))
    console.print(facts)

    columns = ("layer", "rows", "dim", "dtype", "optimizer", "base", "overlay", "disk")
    table = Table(*columns, box=None, header_style="bold", padding=(0, 2, 0, 0))
    for spec in description["tables"]:
        table.add_row(
            str(spec["layer"]),
            f"{spec['rows']:,}",
            str(spec["dim"]),
            spec["dtype"],
            spec["optimizer"],
            f"g{spec['generation']:04d}",
            plural(spec["segments"], "segment"),
            size_text(spec["disk_bytes"]),
        )
    console.print()
    console.print(table)


def _steps(steps: list[int]) -> str:
    """All of a few, the newest of many."""
    if not steps:
        return "none"
    if len(steps) <= 8:
        return ", ".join(f"{step:,}" for step in steps)
    newest = ", ".join(f"{step:,}" for step in steps[-6:])
    return f"{len(steps):,}, the newest at {newest}"
