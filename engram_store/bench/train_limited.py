"""Training with a table four times larger than memory, in a process of its own.

`run_limited` starts it in a memory cgroup, `main` is what it runs.
"""

import json
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engram_store.bench.device import enter, memory_group
from engram_store.bench.harness import undisturbed
from engram_store.bench.process import child_result
from engram_store.bench.train_place import TrainPlace, go_back
from engram_store.bench.workplace import LAYER
from engram_store.engine.memory import forget_cached_pages
from engram_store.types import TokenIds

SHARE = 4
"""The table is so many times larger than memory."""
LEAST_LIMIT = 1200 << 20
"""What a process needs that trains the model and a store; with less the kernel would end it."""
_SECONDS = 3600.0
_CONSTANT_STEPS = 6
"""Steps without a table before, between and after the passes; the first of them does not count."""
_COUNTED = ("RssAnon", "RssShmem")


@dataclass(frozen=True, kw_only=True, slots=True)
class LimitedOrder:
    """What a process is to train."""

    store: str
    tokens: str
    """int64 [steps, batch, time] in a file of numpy: one pass over the text."""
    narrow: str
    """`TrainText.narrow`, in another one."""
    depth: int
    """Windows announced ahead."""
    group: str | None = None
    """Memory cgroup to enter."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Pass:
    """One pass over the text."""

    step_ms: list[float]
    wait_seconds: float
    """Of all steps, what they waited for rows."""
    pages: int
    """That were read from the disk, of 4 KiB."""
    cold_rows: int
    faults: int
    """Pages that had to be waited for one by one."""
    late: int
    """Windows that were not there when they were asked for."""

    @property
    def mean_ms(self) -> float:
        """Of a step."""
        return float(np.mean(self.step_ms))

    @property
    def waiting(self) -> float:
        """Share of the time, in percent, that was spent waiting for rows."""
        return 1e5 * self.wait_seconds / float(np.sum(self.step_ms))

    @property
    def pages_per_step(self) -> float:
        """Read from the disk."""
        return self.pages / len(self.step_ms)


@dataclass(frozen=True, kw_only=True, slots=True)
class Limited:
    """What came of it."""

    constant_ms: list[float]
    """Steps of the same model without a table."""
    first: Pass
    second: Pass
    memory_bytes: int
    """Anonymous and shared memory at the end."""
    changed: float
    """Share of the rows of the first step that training has changed."""

    @property
    def model_ms(self) -> float:
        """Mean step of the model alone."""
        return float(np.mean(self.constant_ms))

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "Limited":
        """What `main` printed."""
        passes = {name: Pass(**data[name]) for name in ("first", "second")}
        return cls(**{**data, **passes})


@dataclass(frozen=True, slots=True)
class LimitedPlace:
    """A store at step 0, its text, and how much memory there is."""

    root: Path
    order: LimitedOrder
    limit_bytes: int

    @classmethod
    def make(
        cls, root: Path, steps: TokenIds, narrow: NDArray[np.int64], table_bytes: int
    ) -> "LimitedPlace":
        """Write down what the process reads: tokens [steps, batch, time], `TrainText.narrow`."""
        room = root.parent
        np.save(room / "train-tokens.npy", steps)
        np.save(room / "train-narrow.npy", narrow)
        order = LimitedOrder(
            store=str(root),
            tokens=str(room / "train-tokens.npy"),
            narrow=str(room / "train-narrow.npy"),
            depth=0,
        )
        return cls(root, order, max(table_bytes // SHARE, LEAST_LIMIT))


def run_limited(place: LimitedPlace, depth: int) -> Limited:
    """Train two passes with little memory, nothing cached at first; forgotten afterwards.

    Raises:
        OSError: a cgroup cannot be made.
        EngramStoreError: the process failed.
    """
    for path in place.root.rglob("*"):
        if path.is_file():
            forget_cached_pages(path)
    with memory_group(place.limit_bytes) as group:
        order = replace(place.order, depth=depth, group=str(group))
        answer = child_result(__name__, asdict(order), _SECONDS)
    go_back(place.root)
    return Limited.from_json(answer)


def main() -> None:
    """Train as the first argument orders, and print what came of it."""
    order = LimitedOrder(**json.loads(sys.argv[1]))
    if order.group is not None:
        enter(order.group)
    sys.stdout.write(json.dumps(_train(order)) + "\n")


def _train(order: LimitedOrder) -> dict[str, Any]:
    """All defaults of `engram_store.open`: how memory is split is the store's affair."""
    import engram_store
    from engram_store.bench.train_arms import ConstantRows, LocalLine, StoreLine

    steps = np.load(order.tokens)
    with engram_store.open(order.store, "train") as store:
        place = TrainPlace.of(store.recipe, store.tables[LAYER].dim, steps, np.load(order.narrow))
        constant = LocalLine(place, ConstantRows(place, gradients=True))
        line = StoreLine(place, store, depth=order.depth)
        passes, constant_ms = [], _block(constant)
        with undisturbed():
            for _ in range(2):
                passes.append(_one_pass(store, line, len(steps)))
                constant_ms += _block(constant)
        memory = _resident_bytes()
        line.close()
        changed = line.changed()
    return {
        "constant_ms": constant_ms,
        "first": passes[0],
        "second": passes[1],
        "memory_bytes": memory,
        "changed": changed,
    }


def _block(line: Any) -> list[float]:
    """Milliseconds of some steps."""
    return [_timed(line.step) for _ in range(_CONSTANT_STEPS)][1:]


def _one_pass(store: Any, line: Any, steps: int) -> dict[str, Any]:
    before = store.stats()
    step_ms = [_timed(line.step) for _ in range(steps)]
    after = store.stats()
    then, now = before.tables[LAYER], after.tables[LAYER]
    return {
        "step_ms": step_ms,
        "wait_seconds": after.wait_seconds - before.wait_seconds,
        "pages": now.pages_read - then.pages_read,
        "cold_rows": now.cold_rows - then.cold_rows,
        "faults": now.page_faults - then.page_faults,
        "late": after.late_windows - before.late_windows,
    }


def _timed(step: Any) -> float:
    started = time.perf_counter()
    step()
    return (time.perf_counter() - started) * 1e3


def _resident_bytes() -> int:
    values = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return sum(int(values[name].split()[0]) * 1024 for name in _COUNTED)
