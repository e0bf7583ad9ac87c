"""Progress of the demo's phases, on stderr."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import exp
from statistics import fmean
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from engram_store_client.demo.base import OnStep

_SHOWN = 20
"""Losses are shown as their mean over so many steps, perplexities as that of this mean."""


class Phases:
    """One bar per phase, or one line where there is no terminal; remembers how long each took."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._console = Console(stderr=True)
        self._progress = Progress(
            TextColumn("{task.description:<28}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeRemainingColumn(elapsed_when_finished=True),
            TextColumn("{task.fields[note]}"),
            console=self._console,
            disable=not self._console.is_terminal,
        )

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._progress.stop()

    @contextmanager
    def phase(self, name: str, steps: int) -> Iterator[OnStep]:
        """Show a phase; call what it yields after every step with the step's number and loss."""
        task = self._progress.add_task(name, total=steps, note="")
        losses: list[float] = []
        note = ""

        def on_step(step: int, loss: float) -> None:
            nonlocal note
            losses.append(loss)
            loss = fmean(losses[-_SHOWN:])
            note = f"step {step + 1}, loss {loss:.3f}, perplexity {exp(loss):.0f}"
            self._progress.update(task, advance=1, note=note)

        start = time.perf_counter()
        yield on_step
        self._end(name, time.perf_counter() - start, note)

    @contextmanager
    def jobs(self, name: str, count: int) -> Iterator[Callable[[str], None]]:
        """Show a phase of a few named jobs; call what it yields before each."""
        task = self._progress.add_task(name, total=count, note="")
        start, begun = time.perf_counter(), 0

        def begin(job: str) -> None:
            nonlocal begun
            self._progress.update(task, completed=begun, note=job)
            begun += 1

        yield begin
        self._progress.update(task, completed=count, note="")
        self._end(name, time.perf_counter() - start)

    def _end(self, name: str, seconds: float, note: str = "") -> None:
        self.seconds[name] = seconds
        if not self._console.is_terminal:
            self._console.print(f"{name}: {seconds:.0f} s {note}".rstrip())
