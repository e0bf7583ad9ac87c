"""`engram-store bench`: how fast this machine does what training needs."""

from pathlib import Path
from typing import Annotated

import typer

bench = typer.Typer(add_completion=False, no_args_is_help=True)

_Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
_Rows = Annotated[int, typer.Option(help="Rows of the table.")]
_Tokens = Annotated[int, typer.Option(help="Tokens of a step.")]
_Steps = Annotated[int, typer.Option(help="Timed repetitions.")]
_Directory = Annotated[
    Path | None,
    typer.Option("--dir", help="Where to work; kept, so that the next run starts at once."),
]
_ROWS, _TOKENS, _STEPS = 16_700_000, 16_384, 40


@bench.callback()
def _group() -> None:
    """Measure a window or a commit, each beside its references in the same run."""


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


def _run(
    which: str, as_json: bool, rows: int, tokens: int, steps: int, directory: Path | None
) -> None:
    typer.echo(f"bench {which}: {rows:,} rows, {tokens:,} tokens a step", err=True)
    from engram_store.bench import Workload, run_bench

    def progress(text: str) -> None:
        typer.echo(f"  {text} ...", err=True)

    workload = Workload(rows=rows, tokens=tokens, repetitions=steps)
    report = run_bench(which, workload, directory, progress)
    if as_json:
        from json import dumps

        typer.echo(dumps(report.to_json(), indent=2))
    else:
        from engram_store.bench.report import print_report

        print_report(report)
