"""`engram-store bench`: how fast this machine does what training needs."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from engram_store.errors import ConfigError

if TYPE_CHECKING:
    from engram_store.bench import Workload

bench = typer.Typer(add_completion=False, no_args_is_help=True)

_Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
_Plot = Annotated[
    Path | None,
    typer.Option("--plot", help="Draw the report: a .png file, or a directory for one."),
]
_Rows = Annotated[int, typer.Option(help="Rows of the table.")]
_Tokens = Annotated[int, typer.Option(help="Tokens of a step.")]
_Steps = Annotated[int, typer.Option(help="Timed repetitions.")]
_Directory = Annotated[
    Path | None,
    typer.Option("--dir", help="Where to work; kept, so that the next run starts at once."),
]
_Quick = Annotated[bool, typer.Option(help="Small sizes, whatever else is given.")]
_Peers = Annotated[bool, typer.Option(help="Compare with other software that is installed.")]
_ROWS, _TOKENS, _STEPS = 16_700_000, 16_384, 40
_TRAIN_ROWS, _CARD_ROWS, _CARD_TOKENS = 8_200_000, 19_600_000, 2_048
_QUICK_ROWS, _QUICK_TOKENS, _QUICK_STEPS = 1_000_000, 2_048, 10


@bench.callback()
def _group() -> None:
    """Measure what training asks of a store, beside references of the same run."""


@bench.command()
def window(
    json: _Json = False,
    plot: _Plot = None,
    rows: _Rows = _ROWS,
    tokens: _Tokens = _TOKENS,
    steps: _Steps = _STEPS,
    peers: _Peers = True,
    quick: _Quick = False,
    directory: _Directory = None,
) -> None:
    """From the tokens of a step to its rows: hash, remove repeats, gather."""
    _compare("window", json, plot, rows, tokens, steps, peers, quick, directory)


@bench.command()
def update(
    json: _Json = False,
    plot: _Plot = None,
    rows: _Rows = _ROWS,
    tokens: _Tokens = _TOKENS,
    steps: _Steps = _STEPS,
    peers: _Peers = True,
    quick: _Quick = False,
    directory: _Directory = None,
) -> None:
    """A commit: optimiser step on every row of a step, crash-safe."""
    _compare("update", json, plot, rows, tokens, steps, peers, quick, directory)


@bench.command()
def ipc(
    json: _Json = False,
    plot: _Plot = None,
    rows: _Rows = _ROWS,
    tokens: _Tokens = _TOKENS,
    steps: _Steps = _STEPS,
    directory: _Directory = None,
) -> None:
    """What a store process costs over the store in the trainer's own process."""
    from engram_store.bench import Workload

    workload = Workload(rows=rows, tokens=tokens, repetitions=steps)
    _measure("ipc", json, plot, workload, directory)


@bench.command()
def recover(
    json: _Json = False,
    plot: _Plot = None,
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
    _measure("recover", json, plot, workload, directory)


@bench.command()
def writes(
    json: _Json = False,
    plot: _Plot = None,
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
    _measure("writes", json, plot, workload, directory)


@bench.command()
def growth(
    json: _Json = False,
    plot: _Plot = None,
    rows: Annotated[int, typer.Option(help="Rows of the smallest table.")] = 1_000_000,
    tokens: _Tokens = _TOKENS,
    steps: _Steps = _STEPS,
    quick: _Quick = False,
    directory: _Directory = None,
) -> None:
    """Windows and commits of tables that have 10 and 100 times as many rows."""
    from engram_store.bench import GrowthWorkload

    if quick:
        rows, tokens, steps = _QUICK_ROWS // 10, _QUICK_TOKENS, _QUICK_STEPS
    workload = GrowthWorkload(rows=rows, tokens=tokens, repetitions=steps)
    _measure("growth", json, plot, workload, directory)


@bench.command()
def train(
    json: _Json = False,
    plot: _Plot = None,
    device: Annotated[
        str, typer.Option(help="cpu: a small model. cuda: one of 4 billion parameters on a card.")
    ] = "cpu",
    rows: Annotated[
        int | None,
        typer.Option(
            help="Rows of the table that fits into memory (8,200,000); on a card of each table "
            "(19,600,000, which are 2.5 GB)."
        ),
    ] = None,
    tokens: Annotated[
        int | None, typer.Option(help="Tokens of a step (16,384; on a card 2,048).")
    ] = None,
    steps: Annotated[int, typer.Option(help="Timed steps of every line.")] = _STEPS,
    tables: Annotated[int, typer.Option(help="On a card: tables, each before a block.")] = 4,
    sequence: Annotated[int, typer.Option(help="On a card: tokens of a sequence.")] = 2_048,
    vram_gib: Annotated[
        float, typer.Option(help="On a card: GiB of its memory that may be used.")
    ] = 24.0,
    trace: Annotated[
        Path | None,
        typer.Option(help="On a card: file for a profiler's trace of three steps (.json)."),
    ] = None,
    limited_rows: Annotated[
        int, typer.Option(help="Rows of the table that is four times the memory limit.")
    ] = 44_000_000,
    limited_tokens: Annotated[
        int, typer.Option(help="Tokens of a step while memory is limited.")
    ] = 4096,
    limited_steps: Annotated[
        int, typer.Option(help="Steps of one pass over the text while memory is limited.")
    ] = 64,
    quick: _Quick = False,
    directory: _Directory = None,
) -> None:
    """Tokens a second of a model, beside rows in memory and no table at all."""
    if device not in ("cpu", "cuda"):
        raise ConfigError(f"bench train runs on 'cpu' or 'cuda', not on {device!r}")
    if device == "cuda":
        sizes = (rows or _CARD_ROWS, tokens or _CARD_TOKENS, steps)
        _train_on_card(json, plot, sizes, tables, sequence, vram_gib, trace, directory)
        return
    rows, tokens = rows or _TRAIN_ROWS, tokens or _TOKENS
    # Before torch is loaded: its threads spin while they wait, on the cores that a store works on.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from engram_store.bench.train_place import TrainWorkload

    if quick:
        rows, limited_rows = _QUICK_ROWS, _QUICK_ROWS
        tokens, limited_tokens = _QUICK_TOKENS, _QUICK_TOKENS
        steps, limited_steps = _QUICK_STEPS, _QUICK_STEPS
    workload = TrainWorkload(
        rows=rows,
        tokens=tokens,
        repetitions=steps,
        limited_rows=limited_rows,
        limited_tokens=limited_tokens,
        limited_steps=limited_steps,
    )
    _measure("train", json, plot, workload, directory)


def _train_on_card(
    as_json: bool,
    plot: Path | None,
    sizes: tuple[int, int, int],
    tables: int,
    sequence: int,
    vram_gib: float,
    trace: Path | None,
    directory: Path | None,
) -> None:
    from engram_store.bench.gpu_place import GpuWorkload

    rows, tokens, steps = sizes
    workload = GpuWorkload(
        rows=rows,
        tokens=tokens,
        repetitions=steps,
        tables=tables,
        sequence=sequence,
        vram_bytes=int(vram_gib * 2**30),
        trace=trace,
    )
    _measure("train-cuda", as_json, plot, workload, directory)


@bench.command()
def cold(
    json: _Json = False,
    plot: _Plot = None,
    rows: Annotated[int, typer.Option(help="Rows of the table; each is written.")] = 33_500_000,
    tokens: _Tokens = _TOKENS,
    steps: Annotated[int, typer.Option(help="Rounds; everybody has a turn in each.")] = 5,
    windows: Annotated[int, typer.Option(help="Different windows of a round.")] = 6,
    look_ahead: Annotated[int, typer.Option(help="Steps by which windows are announced.")] = 2,
    fio_seconds: Annotated[float, typer.Option(help="How long fio reads each time.")] = 1.0,
    quick: _Quick = False,
    directory: _Directory = None,
) -> None:
    """Rows that are not in memory: reads a second and CPU time, beside fio and others."""
    from engram_store.bench import ColdWorkload

    if quick:
        rows, tokens, steps, windows, fio_seconds = _QUICK_ROWS, _QUICK_TOKENS, 1, 2, 0.2
    workload = ColdWorkload(
        rows=rows,
        tokens=tokens,
        repetitions=steps,
        windows=windows,
        look_ahead=look_ahead,
        fio_seconds=fio_seconds,
    )
    _measure("cold", json, plot, workload, directory)


@bench.command()
def hitrate(
    json: _Json = False,
    plot: _Plot = None,
    rows: Annotated[int, typer.Option(help="Rows of the table.")] = 8_350_000,
    tokens: Annotated[int, typer.Option(help="Tokens of a step.")] = 4_096,
    steps: Annotated[int, typer.Option(help="Timed steps of each point.")] = 8,
    trained_steps: Annotated[
        int, typer.Option(help="Steps that the store was trained for before.")
    ] = 240,
    quick: _Quick = False,
    directory: _Directory = None,
) -> None:
    """Device reads and step time over memory, beside rows that are updated in place."""
    from engram_store.bench import HitrateWorkload

    if quick:
        rows, tokens, steps, trained_steps = _QUICK_ROWS, _QUICK_TOKENS // 2, 2, 6
    workload = HitrateWorkload(
        rows=rows, tokens=tokens, repetitions=steps, trained_steps=trained_steps
    )
    _measure("hitrate", json, plot, workload, directory)


def _compare(
    which: str,
    as_json: bool,
    plot: Path | None,
    rows: int,
    tokens: int,
    steps: int,
    peers: bool,
    quick: bool,
    directory: Path | None,
) -> None:
    from engram_store.bench import ComparedWorkload

    if quick:
        rows, tokens, steps = _QUICK_ROWS, _QUICK_TOKENS, _QUICK_STEPS
    workload = ComparedWorkload(rows=rows, tokens=tokens, repetitions=steps, peers=peers)
    _measure(which, as_json, plot, workload, directory)


def _measure(
    which: str, as_json: bool, plot: Path | None, workload: "Workload", directory: Path | None
) -> None:
    """Measure, draw, print: the end of every command."""
    from engram_store.bench import run_bench
    from engram_store.bench.plots import plot_path, plot_report, require_matplotlib

    if plot is not None:
        # Minutes of measuring must not end in an error that was there before.
        require_matplotlib()
        plot_path(plot, which)
    typer.echo(
        f"bench {which}: {workload.rows:,} rows, {workload.tokens:,} tokens a step", err=True
    )

    def progress(text: str) -> None:
        typer.echo(f"  {text} ...", err=True)

    report = run_bench(which, workload, directory, progress)
    if as_json:
        from json import dumps

        typer.echo(dumps(report.to_json(), indent=2))
    else:
        from engram_store.bench.report import print_report

        print_report(report)
    if plot is not None:
        typer.echo(f"drawn to {plot_report(report, plot)}", err=True)
