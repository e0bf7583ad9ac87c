"""What the demo found out: as a verdict, a table, and JSON."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from engram_store.cli.output import size_text
from engram_store.stats import StoreStats
from engram_store_client.demo.interrupt import Interrupted
from engram_store_client.demo.tables import RowCount
from engram_store_client.windows import Guards

_HELP = (
    "How to read it: perplexity is how many tokens the model hesitates between, lower is better. "
    "The control has the same gates, data and steps but rows of zero, so only what Engram gains "
    "beyond the control was learned by the tables; code shows what the model forgot meanwhile."
)


@dataclass(frozen=True, slots=True)
class Perplexities:
    """On whole held-out files."""

    prose: float
    code: float


@dataclass(frozen=True, kw_only=True, slots=True)
class ArmResult:
    """One way to train the memory, and what came of it."""

    perplexities: Perplexities
    transport: str
    """How rows reached the trainer."""
    guards: Guards
    stats: StoreStats
    """After the last training step, evaluation not counted."""
    seconds: float
    """Of all training steps."""
    wait_seconds: float
    """Of those, spent in the trainer waiting for rows."""
    steps: int
    rows: RowCount = field(default=RowCount(0, 0))


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """All results of one run."""

    base: Perplexities
    control: ArmResult
    engram: ArmResult
    interrupted: Interrupted
    phase_seconds: Mapping[str, float]
    seconds: float

    def failures(self) -> list[str]:
        """What a memory must do and this one did not."""
        found = []
        run = self.interrupted
        if run.differences:
            first = ", ".join(run.differences[:3])
            found.append(f"the interrupted run differs from the undisturbed one: {first}")
        if run.found_step <= run.killed_after:
            found.append(
                f"steps were lost with their trainer: it had committed step {run.killed_after}, "
                f"the store had {run.found_step} steps"
            )
        if self.engram.perplexities.prose >= self.control.perplexities.prose:
            found.append("Engram is not better than its zero-table control")
        if not (self.engram.rows.changed and self.engram.guards.backward_calls):
            found.append("Engram's tables were not trained")
        if self.control.rows.changed or self.control.guards.backward_calls:
            found.append("the control's tables were trained")
        return found

    def to_json(self) -> dict[str, Any]:
        """As JSON types."""
        stats = self.engram.stats
        return {
            **asdict(self),
            "engram_derived": {
                "wait_ms_per_step": 1000 * self.engram.wait_seconds / self.engram.steps,
                "write_amplification": stats.write_amplification,
                "overlay_hit_rate": {n: t.overlay_hit_rate for n, t in stats.tables.items()},
                "resident_share": {n: t.resident_share for n, t in stats.tables.items()},
                "lookups_per_unique_row": {n: t.duplication for n, t in stats.tables.items()},
            },
            "failures": self.failures(),
        }


def print_report(report: Report) -> None:
    """The table, a sentence on how to read it, and the verdict."""
    console = Console()
    table = Table(title="What was learned, and what it took")
    table.add_column("", no_wrap=True)
    for name in ("base", "zero-table control", "Engram"):
        table.add_column(name, justify="right")
    sections = _learned(report), _evidence(report), _cost(report.engram)
    for section in (*sections, _safety(report.interrupted)):
        for label, *cells in section:
            table.add_row(label, *cells)
        table.add_section()
    console.print(table)
    console.print(_HELP)
    console.print(_verdict(report))
    console.print(f"Took {report.seconds:.0f} s.")
    for failure in report.failures():
        console.print(f"[red]failed:[/] {escape(failure)}")


def _learned(report: Report) -> Iterator[tuple[str, ...]]:
    """Perplexities, and their change against the base."""
    arms = (report.base, report.control.perplexities, report.engram.perplexities)
    for label, values in (
        ("perplexity, prose (new)", [arm.prose for arm in arms]),
        ("perplexity, code (known)", [arm.code for arm in arms]),
    ):
        yield label, *(f"{value:.1f}" for value in values)
        yield "  against the base", "", *(f"{value / values[0] - 1:+.1%}" for value in values[1:])


def _evidence(report: Report) -> Iterator[tuple[str, ...]]:
    """Whether tables were trained at all."""
    arms = (report.control, report.engram)
    label = f"rows changed, of {report.engram.rows.total:,}"
    yield label, "", *(f"{a.rows.changed:,}" for a in arms)
    yield "backward calls", "", *(f"{a.guards.backward_calls:,}" for a in arms)
    yield "time of a step", "", *(f"{1000 * a.seconds / a.steps:.0f} ms" for a in arms)


def _cost(engram: ArmResult) -> Iterator[tuple[str, ...]]:
    """What the store did for the Engram arm."""
    stats, tables = engram.stats, engram.stats.tables.values()
    unique = sum(table.unique_rows for table in tables)
    cells = {
        "rows reach the trainer by": engram.transport,
        "waiting for rows, a step": f"{1000 * engram.wait_seconds / engram.steps:.2f} ms",
        "look-ups per row read": f"{sum(t.lookups for t in tables) / unique:.1f}",
        "rows in shared memory": f"{sum(t.memtable_rows for t in tables) / unique:.1%}",
        "table pages in memory": _share(
            sum(t.resident_bytes for t in tables), sum(t.mapped_bytes for t in tables)
        ),
        "bytes written": size_text(stats.bytes_written),
        "  per byte of updates": f"{stats.write_amplification or 0:.2f}",
    }
    for label, cell in cells.items():
        yield label, "", "", cell


def _share(part: int, whole: int) -> str:
    """Pages are counted whole, so a full table may have a little more of them than bytes."""
    return f"{min(1.0, part / whole):.1%}" if whole else "-"


def _safety(run: Interrupted) -> Iterator[tuple[str, ...]]:
    """The run whose trainer and whose store were killed."""
    yield "trainer killed after step", "", "", f"{run.killed_after:,}"
    yield "  steps found afterwards", "", "", f"{run.found_step:,}"
    yield "  resumed from step", "", "", f"{run.resumed_at:,}"
    for outage in run.outages:
        yield "store killed in step", "", "", f"{outage.step:,}"
        yield "  served again after", "", "", f"{outage.seconds:.1f} s"
        yield "  with so many steps", "", "", f"{outage.found_step:,}"
    verdict = "[green]bit-equal[/]" if run.bit_equal else "[red]differs[/]"
    yield f"state before step {run.compared_at:,}", "", "", verdict


def _verdict(report: Report) -> str:
    """The interruptions in a sentence."""
    run = report.interrupted
    kills = f"The trainer was killed once (kill -9), the store {_times(len(run.outages))}"
    if not run.outages:
        kills = "The trainer was killed (kill -9); the store had no process of its own to kill"
    what = f"{run.rows:,} rows with their state, the gates, their optimiser and {run.losses} losses"
    if run.bit_equal:
        return f"{kills}. {what} are bit for bit those of the undisturbed run."
    return f"{kills}. Of {what}, {len(run.differences)} parts differ from the undisturbed run."


def _times(count: int) -> str:
    return {1: "once", 2: "twice"}.get(count, f"{count} times")
