"""The file of finished runs: one JSON line each, appended whole."""

import fcntl
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.shape.errors import ShapeError
from benchmarks.shape.variants import Run, Variant


@dataclass(frozen=True, slots=True)
class Records:
    """What was run, all on one base."""

    by_run: dict[Run, dict[str, Any]]

    @property
    def base(self) -> str | None:
        """Fingerprint of the base; None: there are no runs."""
        return next((r["base"]["fingerprint"] for r in self.by_run.values()), None)

    def get(self, variant: Variant, seed: int) -> dict[str, Any] | None:
        """A run's record; None: it was not run."""
        return self.by_run.get(Run(variant, seed))

    def perplexities(self, variant: Variant, domain: str, seeds: Iterable[int]) -> list[float]:
        """At the end of a variant's runs, in the order of seeds; fewer when runs are missing."""
        found = (self.get(variant, seed) for seed in seeds)
        return [record["perplexity"][domain] for record in found if record is not None]


def read_records(path: Path) -> Records:
    """Read a file of records; a file that is not there has none.

    Raises:
        ShapeError: a line is no record, or records come from different bases.
    """
    by_run: dict[Run, dict[str, Any]] = {}
    lines = path.read_text().splitlines() if path.exists() else []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            run = Run(Variant.from_json(record["variant"]), record["seed"])
            base = record["base"]["fingerprint"]
        except (ShapeError, ValueError, KeyError, TypeError) as error:
            raise ShapeError(f"{path}, line {number} is no record of a run: {error!r}") from error
        first = next(iter(by_run.values()), record)["base"]["fingerprint"]
        if base != first:
            raise ShapeError(
                f"{path}, line {number} was run on the base {base}, others on {first}: they cannot "
                "be compared. Give each base a file of its own (--records)"
            )
        by_run[run] = record
    return Records(by_run)


def append_record(path: Path, record: dict[str, Any]) -> None:
    """Add a line; several processes may do so at once. Raises: OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.write(json.dumps(record) + "\n")
        file.flush()
