"""`engram-store bench`: how fast this machine does what training needs."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from engram_store.bench import Workload

bench = typer.Typer(add_completion=False, no_args_is_help=True)

_Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
_Rows = Annotated[int, typer.Option(help="Rows of the table.")]
_Tokens = Annotated[int, typer.Option(help="Tokens of a step.")]
_Steps = Annotated[int, typer.Option(help="Timed repetitions.")]
_Directory = Annotated[
    Path | None,
    typer.Option("--dir", help="Where to work; kept, so that the next run starts at once."),
]
_Quick = Annotated[bool, typer.Option(help="Small sizes, whatever else is given.")]
_ROWS, _TOKENS, _STEPS = 16_700_000, 16_384, 40
_QUICK_ROWS, _QUICK_TOKENS = 1_000_000, 2_048


@bench.callback()
def _group() -> None:
    """Measure what training asks of a store, beside references of the same run."""


@bench.command()
def window(
    json: _Json = False,
    rows: _Rows = _ROWS,
    tokens: _Tokens = _TOKENS,
    steps: _Steps = _STEPS,
    directory: _Directory = None,
) -> None:
    """From the tokens of a step to its rows: hash, remove repeats, gather."""
    _run("window", json, rows, tokens, steps, directory)


@bench.command()
def update(
    json: _Json = False,
    rows: _Rows = _ROWS,
    tokens: _Tokens = _TOKENS,
    steps: _Steps = _STEPS,
    directory: _Directory = None,
) -> None:
    """A commit: optimiser step on every row of a step, crash-safe."""
    _run("update", json, rows, tokens, steps, directory)


@bench.command()
def ipc(
    json: _Json = False,
    rows: _Rows = _ROWS,
    tokens: _Tokens = _TOKENS,
    steps: _Steps = _STEPS,
    directory: _Directory = None,
) -> None:
    """What a store process costs over the store in the trainer's own process."""
    _run("ipc", json, rows, tokens, steps, directory)


@bench.command()
def recover(
    json: _Json = False,
    rows: _Rows = _ROWS,
    tokens: _Tokens = _TOKENS,
    steps: Annotated[int, typer.Option(help="Kills of every kind.")] = 3,
    overlay_rows: Annotated[
        int, typer.Option(help="Rows in shared memory when the store is killed.")
    ] = 5_000_000,
    quick: _Quick = False,
    directory: _Directory = None,
) -> None:
    """Reopening after a kill, from a journal and after a close; the pause of a snapshot."""
    from engram_store.bench import RecoverWorkload

    if quick:
        rows, tokens, steps, overlay_rows = _QUICK_ROWS, _QUICK_TOKENS, 1, _QUICK_ROWS // 4
    workload = RecoverWorkload(
        rows=rows, tokens=tokens, repetitions=steps, overlay_rows=overlay_rows
    )
    _measure("recover", json, workload, directory)


@bench.command()
def writes(
    json: _Json = False,
    rows: _Rows = _ROWS,
    tokens: _Tokens = _TOKENS,
    steps: Annotated[int, typer.Option(help="Steps that the store trains.")] = 400,
    limited_steps: Annotated[
        int, typer.Option(help="Steps of every writer while memory is a third of the table.")
    ] = 5,
    quick: _Quick = False,
    directory: _Directory = None,
) -> None:
    """Bytes that training writes, beside writers that update rows where they are."""
    from engram_store.bench import WritesWorkload

    if quick:
        rows, tokens, steps, limited_steps = _QUICK_ROWS, _QUICK_TOKENS, 40, 4
    workload = WritesWorkload(
        rows=rows, tokens=tokens, repetitions=steps, limited_steps=limited_steps
    )
    _measure("writes", json, workload, directory)


def _run(
    which: str, as_json: bool, rows: int, tokens: int, steps: int, directory: Path | None
) -> None:
    from engram_store.bench import Workload

    _measure(which, as_json, Workload(rows=rows, tokens=tokens, repetitions=steps), directory)


def _measure(which: str, as_json: bool, workload: "Workload", directory: Path | None) -> None:
    typer.echo(
        f"bench {which}: {workload.rows:,} rows, {workload.tokens:,} tokens a step", err=True
    )
    from engram_store.bench import run_bench

    def progress(text: str) -> None:
        typer.echo(f"  {text} ...", err=True)

    report = run_bench(which, workload, directory, progress)
    if as_json:
        from json import dumps

        typer.echo(dumps(report.to_json(), indent=2))
    else:
        from engram_store.bench.report import print_report

        print_report(report)
