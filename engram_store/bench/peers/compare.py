"""Peers and the store in turn, on the same batches.

Peers are opened one after the other, because together they would not fit into memory. Each takes
turns with the store, so what is said about it comes from the same minutes; the store's samples of
all of them are put together.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from engram_store.bench.harness import WARM_UP, Case, PeerFact, Report, Timing, measure
from engram_store.bench.machine import version_of
from engram_store.bench.peers import PEERS
from engram_store.bench.peers.protocol import (
    Peer,
    PeerRows,
    TrainingPeer,
    Traits,
    as_bits,
    missing,
)
from engram_store.bench.peers.table import PeerTable
from engram_store.bench.workplace import BATCHES, LAYER, Say, Workplace
from engram_store.types import RowDtype, RowIds

ROWS, LOOKUPS, STEP = "rows", "look-ups", "step"
"""The store's lines; a peer's have its name before them."""
_SLOW_WARM_UP = 1
"""Rounds before timing, of a peer that has few."""


class DisagreementError(AssertionError):
    """A peer reads other rows than the store: nothing about it may be published."""


@dataclass(frozen=True, slots=True)
class Line:
    """Something that is timed, and how many rows of each batch it is about."""

    name: str
    case: Case
    rows: float


@dataclass(frozen=True, slots=True)
class Sample:
    """Rows as the store gives them, to check what a peer reads."""

    rows: RowIds
    bits: NDArray[np.uint16]

    @classmethod
    def of(cls, place: Workplace) -> "Sample":
        """Rows of the last batch that are still what they are in the file that peers copy."""
        rows = np.sort(place.batches[-1].rows)
        rows = rows[place.engine.tables[LAYER].remap[rows] == 0]
        return cls(rows, place.store.read_rows(LAYER, rows))

    def check(self, peer: Peer, rows: PeerRows) -> None:
        """Compare what a peer reads.

        Raises:
            DisagreementError: it reads something else, or nothing could be compared.
        """
        known = np.intersect1d(rows, self.rows)
        if not known.size:
            raise DisagreementError(f"{peer.traits.name}: none of its rows could be checked")
        ours = self.bits[np.searchsorted(self.rows, known)]
        # In the order of the request, which is not sorted.
        order = np.random.default_rng(0).permutation(known.size)
        theirs = as_bits(peer.read(known[order].astype(np.int64)))
        if not np.array_equal(theirs, ours[order]):
            raise DisagreementError(f"{peer.traits.name} reads other rows than the store")


@dataclass
class Comparison:
    """Adds peers to a report.

    Make it before anything is trained: what peers read is compared with the store as it is then.

    Args:
        place: whose table and batches.
        report: gets timings, references and how each peer took part.
        say: told which peer's turn it is.
        peers: factories of peers.
    """

    place: Workplace
    report: Report
    say: Say
    peers: Sequence[Callable[[], Peer]] = PEERS
    sample: Sample = field(init=False)

    def __post_init__(self) -> None:
        if self.place.spec.dtype is not RowDtype.BFLOAT16:
            raise AssertionError("peers are given bfloat16 rows")
        self.sample = Sample.of(self.place)

    def reads(self, unique: Case, lookups: Case) -> None:
        """Compare reading.

        Args:
            unique: the store gathers the unique rows of a batch.
            lookups: the store gives a row for every look-up of a batch.
        """
        batches = self.place.batches
        mean = float(np.mean([batch.lookups.size for batch in batches]))
        ours = (Line(ROWS, unique, self.place.unique_rows()), Line(LOOKUPS, lookups, mean))

        def lines(peer: Peer, held: int) -> dict[str, Line]:
            found = {ROWS: self._reading(peer, held, ROWS)}
            if peer.traits.every_lookup:
                found[LOOKUPS] = self._reading(peer, held, LOOKUPS)
            return found

        self._compare(ours, lines, training=False)

    def _reading(self, peer: Peer, held: int, what: str) -> Line:
        rows = self._parts(peer.traits, held, lookups=what == LOOKUPS)
        return Line(f"{peer.traits.name}: {what}", _read(peer, rows), _mean_size(rows))

    def steps(self, step: Case, gradients: NDArray[np.float32]) -> None:
        """Compare training, for peers that can.

        Args:
            step: the store gives rows, takes gradients and commits.
            gradients: float32 [at least the rows of any batch, dim].
        """
        ours = (Line(STEP, step, self.place.unique_rows()),)

        def lines(peer: Peer, held: int) -> dict[str, Line]:
            if not isinstance(peer, TrainingPeer):
                return {}
            rows = self._parts(peer.traits, held, lookups=False)
            case = _train(peer, rows, gradients)
            return {STEP: Line(f"{peer.traits.name}: {STEP}", case, _mean_size(rows))}

        self._compare(ours, lines, training=True)

    def _parts(self, traits: Traits, held: int, *, lookups: bool) -> list[PeerRows]:
        """Of every batch, the rows that a peer holds and may be asked for at once."""
        found = []
        for batch in self.place.batches:
            rows = batch.lookups if lookups else batch.rows
            found.append(rows[rows < held][: traits.most_batch_rows].astype(np.int64))
        return found

    def _compare(
        self,
        ours: Sequence[Line],
        lines: Callable[[Peer, int], dict[str, Line]],
        *,
        training: bool,
    ) -> None:
        place, samples = self.place, {line.name: list[float]() for line in ours}
        table = PeerTable(
            rows_file=place.flat_file,
            rows=place.spec.rows,
            dim=place.spec.dim,
            directory=place.flat_file.parent / "peers",
            training=training,
        )
        theirs: list[Timing] = []
        for make in self.peers:
            peer = make()
            if training and not isinstance(peer, TrainingPeer):
                continue
            fact, made, timings = self._measure_peer(peer, table, ours, lines)
            self.report.peers.append(fact)
            theirs += timings
            for timing in made:
                samples[timing.name] += timing.samples_ms.tolist()
        self.report.timings += [
            Timing(line.name, np.array(samples[line.name]), line.rows)
            for line in ours
            if samples[line.name]
        ]
        self.report.timings += theirs

    def _measure_peer(
        self,
        peer: Peer,
        table: PeerTable,
        ours: Sequence[Line],
        lines: Callable[[Peer, int], dict[str, Line]],
    ) -> tuple[PeerFact, list[Timing], list[Timing]]:
        """How it took part, the store's timings beside it, and its own."""
        traits = peer.traits
        fact = PeerFact(
            name=traits.name,
            what=traits.what,
            version=version_of(traits.distribution),
            missing=missing(traits),
        )
        if fact.missing:
            return fact, [], []
        self.say(f"measuring {traits.name}")
        try:
            with _one_thread():
                started = time.perf_counter()
                held = peer.open(table)
                opened = time.perf_counter() - started
                rows = self._parts(traits, held, lookups=False)
                self.sample.check(peer, rows[-1])
                found = lines(peer, held)
                fact = replace(
                    fact,
                    table_rows=held,
                    rows_per_batch=round(_mean_size(rows)),
                    open_seconds=round(opened, 2),
                )
                return fact, *self._rounds(traits, ours, found)
        except DisagreementError:
            raise
        except Exception as error:  # a peer that fails is no reason to lose the others
            reason = f"failed: {type(error).__name__}: {str(error)[:200]}"
            return replace(fact, missing=reason), [], []
        finally:
            peer.close()

    def _rounds(
        self, traits: Traits, ours: Sequence[Line], theirs: Mapping[str, Line]
    ) -> tuple[list[Timing], list[Timing]]:
        """Timings of the store's lines that the peer has one for, and of the peer's."""
        beside = [line for line in ours if line.name in theirs]
        together = [*beside, *theirs.values()]
        wanted = self.place.workload.repetitions
        rounds = min(wanted, traits.most_rounds or wanted)
        timings = measure(
            {line.name: line.case for line in together},
            repetitions=rounds,
            batches=BATCHES,
            warm_up=WARM_UP if traits.most_rounds is None else _SLOW_WARM_UP,
        )
        made = [replace(t, rows=line.rows) for t, line in zip(timings, together, strict=True)]
        for name, line in theirs.items():
            self.report.references[name] = (*self.report.references.get(name, ()), line.name)
        return made[: len(beside)], made[len(beside) :]


def _mean_size(parts: Sequence[PeerRows]) -> float:
    return float(np.mean([part.size for part in parts]))


def _read(peer: Peer, rows: Sequence[PeerRows]) -> Case:
    def case(number: int) -> None:
        peer.read(rows[number])

    return case


def _train(peer: TrainingPeer, rows: Sequence[PeerRows], gradients: NDArray[np.float32]) -> Case:
    def case(number: int) -> None:
        peer.train(rows[number], gradients[: rows[number].size])

    return case


@contextmanager
def _one_thread() -> Iterator[None]:
    """As everything else here runs; torch would take all cores."""
    try:
        import torch
    except ImportError:
        yield
        return
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
