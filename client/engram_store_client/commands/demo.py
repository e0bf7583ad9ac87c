"""`engram-store demo`: tables on disk learn this machine's own text."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from engram_store.errors import ConfigError


def demo(
    directory: Annotated[
        Path | None,
        typer.Option("--dir", help="Where to work: new or empty, and kept. Default: temporary."),
    ] = None,
    keep: Annotated[bool, typer.Option("--keep", help="Keep a temporary directory.")] = False,
    steps: Annotated[
        int | None, typer.Option(min=20, help="Training steps of the control and of Engram.")
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Everything tiny: shows that it works, no more.")
    ] = False,
    seed: Annotated[int, typer.Option(min=0, help="Of all random numbers.")] = 0,
    threads: Annotated[int, typer.Option(min=1, help="Threads of torch.")] = 2,
    embedded: Annotated[
        bool,
        typer.Option("--embedded", help="Without store processes, and so without their kills."),
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Train tables on disk, on this machine's own text, against the zero-table control.

    The stores are processes of their own (`engram-store serve`), which are killed on the way.
    Exit code 1: Engram was not better than the control, or the run whose trainer and whose store
    were killed is not bit-equal to the undisturbed one.
    """
    # Idle threads of torch spin by default, on cores that the store's threads and other
    # programs need (4x slower beside another job). OpenMP reads this once, when torch is loaded.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    with _working_directory(directory, keep=keep) as chosen:
        from engram_store_client.demo.report import print_report
        from engram_store_client.demo.run import run_demo
        from engram_store_client.demo.settings import Settings

        settings = Settings.chosen(quick=quick, steps=steps, seed=seed, threads=threads)
        report = run_demo(chosen, settings, embedded=embedded)
    if json:
        from json import dumps

        typer.echo(dumps(report.to_json(), indent=2))
    else:
        print_report(report)
    if report.failures():
        raise typer.Exit(1)


@contextmanager
def _working_directory(directory: Path | None, *, keep: bool) -> Iterator[Path]:
    """The named directory, or one that is removed afterwards. Raises: ConfigError."""
    if directory is not None:
        directory.mkdir(parents=True, exist_ok=True)
        if any(directory.iterdir()):
            raise ConfigError(f"{directory} is not empty; --dir takes a new or empty directory")
        yield directory
        return
    temporary = Path(tempfile.mkdtemp(prefix="engram-demo-"))
    try:
        yield temporary
    finally:
        if keep:
            typer.echo(f"Files are in {temporary}", err=True)
        else:
            shutil.rmtree(temporary, ignore_errors=True)
