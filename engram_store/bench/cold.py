"""How fast rows that are not in memory are read, beside what the device can do.

Everybody takes turns in each round, because devices are noisy: fio; a window by `Fetcher.fetch`;
windows through `Store.announce`, announced ahead of their step. Then peers, once per round too.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np

from engram_store.bench.cold_peers import (
    PEERS,
    QUEUE_DEPTH,
    ColdPeer,
    DeviceRate,
    fio_missing,
    run_fio,
)
from engram_store.bench.cold_place import ColdPlace, Reading, open_cold_place
from engram_store.bench.harness import (
    ColdWorkload,
    PeerFact,
    Quantity,
    Report,
    Series,
    Target,
    Timing,
    describe_machine,
    undisturbed,
)
from engram_store.bench.workplace import Say
from engram_store.errors import ConfigError, EngramStoreError

FETCH, TRAIN, DEVICE = "fetch", "announce + rows", "fio"
_LEAST_SHARE, _MOST_CPU_US = 85.0, 7.0
_STILL_CACHED = 0.01


def bench_cold(workload: ColdWorkload, directory: Path, say: Say) -> Report:
    """Measure one layer.

    Raises:
        ConfigError: settings make no sense, or the disk is too small.
    """
    if min(workload.windows, workload.look_ahead + 1) < 1 or workload.fio_seconds <= 0:
        raise ConfigError(
            f"windows are {workload.windows}, look_ahead {workload.look_ahead}, fio_seconds "
            f"{workload.fio_seconds:g}; give 1 window at least, look_ahead from 0, and more than "
            "no time for fio"
        )
    with open_cold_place(workload, directory, say) as place:
        report = Report(bench="cold", machine=describe_machine(), workload=place.describe())
        rounds = _Rounds(place)
        _warm_up(place)
        with undisturbed():
            for number in range(workload.repetitions):
                say(f"reading cold windows, round {number + 1} of {workload.repetitions}")
                rounds.take(number)
    rounds.write(report)
    return report


def _warm_up(place: ColdPlace) -> None:
    """Compile kernels and start threads; what is in memory is pushed out before each part."""
    place.fetch(0)
    place.train()


@dataclass
class _Rounds:
    """What was measured, round after round."""

    place: ColdPlace
    readings: dict[str, list[Reading]] = field(default_factory=lambda: {FETCH: [], TRAIN: []})
    shares: dict[str, list[float]] = field(default_factory=lambda: {FETCH: [], TRAIN: []})
    """Pages a second, per cent of fio's reads a second just before and after."""
    device: list[DeviceRate] = field(default_factory=list)
    peers: dict[str, list[tuple[float, float]]] = field(default_factory=dict)
    """(seconds, CPU seconds) of each."""
    cached: list[float] = field(default_factory=list)
    """Share of the table that could not be pushed out of memory."""
    no_device: str | None = None
    """Why fio says nothing."""
    _last_rate: DeviceRate | None = None

    def take(self, number: int) -> None:
        """One round."""
        place = self.place
        for turn in range(place.workload.windows):
            self._read(FETCH, partial(place.fetch, turn))
        self._read(TRAIN, place.train)
        self._last_rate = None
        for peer in PEERS:
            if peer.missing is None:
                rows = self._rows_for(peer, number)
                measured = peer.measure(place.flat_file, place.spec.dim, rows)
                self.peers.setdefault(peer.traits.name, []).append(measured)

    def _read(self, name: str, read: Callable[[], Reading]) -> None:
        """Between two runs of fio, whose mean is what the device can do just now."""
        before = self._last_rate or self._ask_device()
        self.cached.append(self.place.evict())
        reading = read()
        self.readings[name].append(reading)
        after = self._last_rate = self._ask_device()
        if before is not None and after is not None:
            device = (before.reads_per_second + after.reads_per_second) / 2
            self.shares[name].append(100 * reading.pages_per_second / device)

    def _ask_device(self) -> DeviceRate | None:
        self.no_device = self.no_device or fio_missing()
        if self.no_device is not None:
            return None
        try:
            rate = run_fio(self.place.base_files, self.place.workload.fio_seconds)
        except EngramStoreError as error:
            self.no_device = str(error)
            self.device.clear()
            for shares in self.shares.values():
                shares.clear()
            return None
        self.device.append(rate)
        return rate

    def _rows_for(self, peer: ColdPeer, number: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
        """Other rows in each round, in the order of the window's look-ups."""
        batches = self.place.batches
        rows = batches[number % len(batches)].rows
        return rows[: peer.most_rows].astype(np.int64)

    # ------------------------------------------------------------------ what came of it

    def write(self, report: Report) -> None:
        """Lines, quantities, curves, targets and notes."""
        self._write_timings(report)
        self._write_quantities(report)
        for name in (FETCH, TRAIN):
            shares = self.shares[name]
            measured = float(np.median(shares)) if shares else None
            what = f"{name}: reads a second, of fio's"
            report.targets.append(Target.at_least(what, _LEAST_SHARE, measured, "%"))
        for name, readings in self.readings.items():
            cpu = float(np.median([reading.cpu_us_per_page for reading in readings]))
            what = f"{name}: CPU time of a page"
            report.targets.append(Target.at_most(what, _MOST_CPU_US, cpu, "us"))
        report.notes = self._notes()

    def _write_timings(self, report: Report) -> None:
        for name, readings in self.readings.items():
            each = np.array([1e3 * reading.seconds / reading.windows for reading in readings])
            rows = float(np.mean([reading.rows / reading.windows for reading in readings]))
            report.timings.append(Timing(f"{name}: a window", each, rows))
        for peer in PEERS:
            name, reason = peer.traits.name, peer.missing
            measured = self.peers.get(name, [])
            fact = PeerFact(name=name, what=peer.traits.what, version=peer.version, missing=reason)
            if measured:
                asked = self._rows_for(peer, 0).size
                each = np.array([1e3 * seconds for seconds, _ in measured])
                report.timings.append(Timing(name, each, float(asked)))
                fact = replace(
                    fact, table_rows=self.place.spec.rows, rows_per_batch=asked, open_seconds=0.0
                )
            report.peers.append(fact)
        for name in self.readings:
            report.references[f"{name}: a window"] = tuple(self.peers)

    def _write_quantities(self, report: Report) -> None:
        def add(name: str, unit: str, samples: list[float]) -> None:
            if samples:
                report.quantities.append(Quantity(name, unit, np.array(samples)))

        rates = [rate.reads_per_second for rate in self.device]
        add(DEVICE, "reads of 4 KiB a second", rates)
        for name, readings in self.readings.items():
            each = [reading.pages_per_second for reading in readings]
            add(name, "reads of 4 KiB a second", each)
        for name in self.readings:
            add(name, "% of fio's reads a second", self.shares[name])
        add(DEVICE, "us of CPU a read", [rate.cpu_us_per_read for rate in self.device])
        for name, readings in self.readings.items():
            add(name, "us of CPU a read", [reading.cpu_us_per_page for reading in readings])
        row_bytes = self.place.spec.row_bytes
        for name, readings in self.readings.items():
            add(name, "pages of a window", [r.pages / r.windows for r in readings])
            add(name, "re-faults of a window", [r.faults / r.windows for r in readings])
            read = [reading.amplification(row_bytes) for reading in readings]
            add(name, "bytes read for a byte of rows", read)
        self._write_series(report)

    def _write_series(self, report: Report) -> None:
        """How the rounds went: devices have moods."""
        curves = {name: [r.pages_per_second for r in self.readings[name]] for name in self.readings}
        rounds = self.place.workload.repetitions
        curves[DEVICE] = [rate.reads_per_second for rate in self.device]
        for name, values in curves.items():
            if values:
                each = np.array(values).reshape(rounds, -1).mean(axis=1)
                report.series.append(
                    Series(
                        name=name,
                        x_label="round",
                        y_label="reads of 4 KiB a second",
                        x=tuple(float(k + 1) for k in range(rounds)),
                        y=tuple(float(value) for value in each),
                    )
                )

    def _notes(self) -> list[str]:
        workload = self.place.workload
        notes = [
            "before each part the table's files are pushed out of the page cache, and known to be",
            f"'{FETCH}': one window by the engine alone",
            f"'{TRAIN}': {workload.windows} windows in turn, pushed and committed",
            f"each of them is announced {workload.look_ahead} steps ahead of its own",
            "CPU time is that of all threads of the process, hashing and copying included",
            "times of peers count the rows that they were asked for, one after the other",
        ]
        if self.no_device is None:
            notes.append(
                f"fio: io_uring, O_DIRECT, {QUEUE_DEPTH} reads of 4 KiB at once, random, on the "
                "store's own files; shares are of its mean just before and just after"
            )
        else:
            notes.append(self.no_device)
        if (most := max(self.cached)) > _STILL_CACHED:
            notes.append(
                f"up to {100 * most:.1f} % of the table could not be pushed out of memory: does "
                "another process have it mapped?"
            )
        return notes
