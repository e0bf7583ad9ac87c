"""A report for people."""

from typing import Any

from rich.console import Console
from rich.table import Table

from engram_store.bench.harness import PeerFact, Quantity, Report, Target


def print_report(report: Report, console: Console | None = None) -> None:
    """Every timing with what it is compared with, then the targets."""
    console = console or Console()
    machine, work = report.machine, report.workload
    console.print(
        f"[bold]{report.bench}[/]: {work['tokens']:,} tokens, {work['lookups_per_step']:,} "
        f"look-ups, {work['unique_rows_per_step']:,} unique rows of {work['row_bytes']} bytes "
        f"in {work['table_rows']:,}"
    )
    loads = ", ".join(f"{load:g}" for load in machine["load_average"])
    console.print(f"{machine['cpu']}, {machine['cores']} cores, load {loads}", style="dim")
    if place := _place(machine):
        console.print(place, style="dim")

    table = Table(box=None, header_style="bold", padding=(0, 2, 0, 0))
    table.add_column("one layer")
    by_row = any(timing.rows for timing in report.timings)
    for name in ("median ms", "p95", *(["ns a row"] if by_row else [])):
        table.add_column(name, justify="right")
    table.add_column("takes")
    for timing in report.timings:
        compared = report.ratios(timing).items()
        row_cost = "" if timing.ns_per_row is None else f"{timing.ns_per_row:,.1f}"
        table.add_row(
            timing.name,
            f"{timing.median_ms:.2f}",
            f"{timing.p95_ms:.2f}",
            *([row_cost] if by_row else []),
            "\n".join(f"{_number(ratio)} of {name}" for name, ratio in compared),
            style=None if compared else "dim",
        )
    console.print()
    console.print(table)
    if report.quantities:
        console.print()
        console.print(_quantities(report.quantities))
    console.print()
    for target in report.targets:
        console.print(_target_line(target))
    for note in report.notes:
        console.print(note, style="dim")
    for peer in report.peers:
        console.print(_peer_line(peer), style="dim", markup=False)


def _place(machine: dict[str, Any]) -> str:
    """What else decides how fast this was, as far as it is known."""
    limit, pages = machine.get("memory_limit_bytes"), machine.get("transparent_huge_pages", {})
    facts = {
        "memory limit": f"{limit / 1e9:.1f} GB" if limit else None,
        "huge pages": pages.get("anonymous"),
        "on": " ".join(filter(None, (machine.get("file_system"), machine.get("device")))),
        "revision": machine.get("revision"),
    }
    return ", ".join(f"{name} {fact}" for name, fact in facts.items() if fact)


def _peer_line(peer: PeerFact) -> str:
    """How a peer was used, or why it was not."""
    if peer.missing is not None:
        return f"{peer.name}: {peer.missing}"
    return (
        f"{peer.name} {peer.version}: {peer.what}; holds the first {peer.table_rows:,} rows, "
        f"asked for {peer.rows_per_batch:,} of a batch; ready after {peer.open_seconds:.1f} s"
    )


def _quantities(quantities: list[Quantity]) -> Table:
    table = Table(box=None, header_style="bold", padding=(0, 2, 0, 0))
    for name in ("", "median", "least", "most"):
        table.add_column(name, justify="right" if name else "left")
    table.add_column("")
    for quantity in quantities:
        values = (quantity.median, quantity.samples.min(), quantity.samples.max())
        table.add_row(quantity.name, *(_number(float(value)) for value in values), quantity.unit)
    return table


def _target_line(target: Target) -> str:
    if target.measured is None:
        return f"[yellow]not measured[/]  {target.what} (target {target.target})"
    mark = "[green]met[/]   " if target.met else "[red]missed[/]"
    word = target.target.split()[-1]
    unit = "x" if word.endswith("x") else f" {word}"
    return f"{mark}  {target.what}: {_number(target.measured)}{unit} (target {target.target})"


def _number(value: float) -> str:
    """Two decimals, or more of what is small."""
    return f"{value:.2f}" if abs(value) >= 1 or not value else f"{value:.2g}"
