"""How soon a store serves again, and what a snapshot costs.

A trainer fills shared memory with rows and is killed; a fresh process opens the store. The same
rows are then opened again after a clean close, spread over segments, and from the journal after
shared memory is gone.
"""

import shutil
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

import engram_store
from engram_store.bench.harness import RecoverWorkload, Report, Target, Timing, describe_machine
from engram_store.bench.pauses import BESIDE, COMMIT, PAUSE, SNAPSHOT, Snapshots
from engram_store.bench.reopening import Reopened, Shop, fill_and_kill, fill_in_segments, reopen
from engram_store.bench.workplace import FIRST_STEP, LAYER, Say, Workplace
from engram_store.engine.extents import BLOCK_SLOTS
from engram_store.engine.memtable import memtable_bytes
from engram_store.engine.placement import SHARED_MEMORY
from engram_store.engine.recovery import RecoveryKind
from engram_store.errors import ConfigError, EngramStoreError
from engram_store.types import TableSpec

KILLED, CLOSED, JOURNAL = "reopen: killed", "reopen: closed", "reopen: from the journal"
SEGMENTS = 8
IN_SEGMENTS = f"reopen: closed, {SEGMENTS} segments"
TAKE_OVER, SEAL, MAP = "killed: take over", "killed: seal", "killed: map"
_REFERENCES: dict[str, tuple[str, ...]] = {
    KILLED: (CLOSED,),
    **dict.fromkeys((TAKE_OVER, SEAL, MAP), (KILLED,)),
    IN_SEGMENTS: (CLOSED,),
    JOURNAL: (KILLED,),
    BESIDE: (COMMIT,),
    PAUSE: (COMMIT,),
}


def bench_recover(place: Workplace, say: Say) -> Report:
    """Measure reopening and snapshots of one layer.

    Raises:
        ConfigError: the overlay is larger than the table or than shared memory.
        EngramStoreError: a process that was started failed.
    """
    workload, spec = place.workload, place.spec
    assert isinstance(workload, RecoverWorkload)
    overlay_bytes = _overlay_bytes(spec, workload.overlay_rows)
    report = Report(bench="recover", machine=describe_machine(), workload=place.describe())
    report.workload["overlay_bytes"] = overlay_bytes
    say("measuring commits beside snapshots")
    snapshots = Snapshots(place)
    pauses = snapshots.pauses()
    report.quantities = [snapshots.proportion()]
    place.store.restore(FIRST_STEP)
    place.store.close()  # the processes open it in turn
    # The store's usual place in shared memory would stay behind if a measurement failed.
    with tempfile.TemporaryDirectory(prefix="engram-store-bench-", dir=SHARED_MEMORY) as directory:
        shop = Shop(
            root=str(place.store.path),
            memtable_dir=directory,
            overlay_bytes=overlay_bytes,
            rows=workload.overlay_rows,
        )
        kills = _Kills(shop)
        for turn in range(workload.repetitions):
            say(f"killing and reopening, {turn + 1} of {workload.repetitions}")
            kills.kill_and_reopen()
            kills.lose_the_host()
        say(f"reopening {SEGMENTS} segments")
        kills.reopen_segments(workload.repetitions)
    report.timings = kills.timings() + pauses
    report.references = _REFERENCES
    _judge(report, workload.overlay_rows)
    return report


def _overlay_bytes(spec: TableSpec, rows: int) -> int:
    """Two memtables of which one holds `rows`. Raises: ConfigError."""
    if not 1024 <= rows <= spec.rows:
        raise ConfigError(
            f"overlay rows are {rows:,}; they are all different, so the table of {spec.rows:,} "
            "rows takes from 1,024 to that many: ask for more --rows or fewer --overlay-rows"
        )
    capacity = -(-rows // BLOCK_SLOTS) * BLOCK_SLOTS
    needed, free = 2 * memtable_bytes([spec], capacity), shutil.disk_usage(SHARED_MEMORY).free
    if needed > free:
        raise ConfigError(
            f"{rows:,} overlay rows need {needed:,} bytes of shared memory, and {SHARED_MEMORY} "
            f"has {free:,}; ask for fewer --overlay-rows"
        )
    return 2 * capacity * (4 + spec.state_bytes + spec.row_bytes)


@dataclass
class _Kills:
    """All openings, by line."""

    shop: Shop
    found: dict[str, list[Reopened]] = field(default_factory=dict)

    def _reopen(self, line: str, kind: RecoveryKind, *, go_back: bool) -> None:
        reopened = reopen(self.shop, go_back=go_back)
        sealed = 0 if kind is RecoveryKind.CLEAN else self.shop.rows
        if (reopened.kind, reopened.sealed_rows) != (str(kind), sealed):
            raise EngramStoreError(
                f"{line}: opening should have found a store that is {kind} with {sealed:,} rows, "
                f"and found {reopened.kind} with {reopened.sealed_rows:,}"
            )
        self.found.setdefault(line, []).append(reopened)

    def kill_and_reopen(self) -> None:
        """After a kill, and once more after a clean close, with the same rows in a segment."""
        fill_and_kill(self.shop, "snapshot")
        self._reopen(KILLED, RecoveryKind.RECOVERED, go_back=False)
        self._reopen(CLOSED, RecoveryKind.CLEAN, go_back=True)

    def lose_the_host(self) -> None:
        """Shared memory is gone, as after a power cut; the journal has every step."""
        fill_and_kill(self.shop, "step")
        for directory in Path(self.shop.memtable_dir).iterdir():
            shutil.rmtree(directory)
        self._reopen(JOURNAL, RecoveryKind.REPLAYED, go_back=True)

    def reopen_segments(self, repetitions: int) -> None:
        """The same rows in several segments."""
        fill_in_segments(self.shop, SEGMENTS)
        there = engram_store.inspect(self.shop.root).tables[LAYER].segments
        if there < SEGMENTS:
            raise EngramStoreError(
                f"{SEGMENTS} segments were wanted, and {there} are there: merged"
            )
        for turn in range(repetitions):
            last = turn == repetitions - 1
            self._reopen(IN_SEGMENTS, RecoveryKind.CLEAN, go_back=last)

    def timings(self) -> list[Timing]:
        """Line by line, the parts under their sum."""
        killed = self.found[KILLED]
        parts = {
            TAKE_OVER: [reopened.take_over_ms for reopened in killed],
            SEAL: [reopened.seal_ms for reopened in killed],
            MAP: [reopened.map_ms for reopened in killed],
        }
        lines = {
            line: [reopened.ms for reopened in self.found[line]]
            for line in (KILLED, CLOSED, IN_SEGMENTS, JOURNAL)
        }
        ordered = {KILLED: lines.pop(KILLED), **parts, **lines}
        return [Timing(name, np.array(samples)) for name, samples in ordered.items()]


def _judge(report: Report, overlay_rows: int) -> None:
    killed, pause = report.timing(KILLED), report.timing(PAUSE)
    assert killed is not None
    assert pause is not None
    proportion = float(report.quantities[0].samples.max())
    report.targets = [
        Target.at_most(
            f"reopening a killed store, {overlay_rows:,} rows in shared memory",
            2, killed.median_ms / 1e3, "s",
        ),
        Target.at_most("pause of a snapshot, median", 20, pause.median_ms),
        Target.at_most("pause of a snapshot, longest", 20, pause.max_ms),
        Target.at_most("bytes of a snapshot, of rows touched, most", 1.1, proportion, "x"),
    ]  # fmt: skip
    report.notes = [
        "'reopen': in a fresh process, from engram_store.open to the first row that is read",
        "the rows in shared memory are all different, so every one of them is sealed",
        "'take over' ends with the first file written, 'seal' when memtables are opened anew",
        f"'{KILLED}' uses the files of the memtables again, the others make new ones",
        f"'{JOURNAL}': durability 'step'; killed, and shared memory removed",
        "files are in the page cache, also the journal, which a host that starts reads from disk",
        f"'{BESIDE}': commits go on while another thread waits in snapshot()",
        f"'{PAUSE}': that, less the median of the commits just before it; nothing is merged then",
        f"'{SNAPSHOT}': how long who asked for it waits until it is durable",
    ]
