"""Every image of a recording, recovered by the store's own code and compared with the truth."""

import contextlib
import logging
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from unittest import mock

import numpy as np

import engram_store
from engram_store.engine import memtable
from engram_store.engine.catalog import Catalog, check_files, fill_table
from engram_store.engine.extents import BLOCK_SLOTS
from engram_store.engine.memtable import slot_bytes
from engram_store.engine.placement import SHARED_MEMORY
from engram_store.engine.recovery import recover
from engram_store.engine.table import Table
from engram_store.layout.disk import Disk
from engram_store.layout.manifest import Manifest
from engram_store.layout.metadata import StoreMetadata
from engram_store.layout.paths import StorePaths
from engram_store.layout.pins import read_pins
from engram_store.testing import Operation, RecordingDisk
from engram_store.testing.crash import (
    Blob,
    FileSystem,
    Image,
    Workspace,
    dead_process,
    lost_host,
    torn_operation,
)
from tests.crash.recordings import STORE
from tests.crash.truth import Contents, Recording, State, Truth, make_state
from tests.pairs import tables_of

OPENED_EVERY = 16
"""Of so many images one is opened with `engram_store.open`; the others skip the threads."""
ANOTHER_BOOT = "00000000-0000-0000-0000-000000000000"


@dataclass(frozen=True, slots=True)
class Outcome:
    """What recovery made of an image."""

    digest: int = 0
    step: int = -1
    snapshots: dict[int, int] = field(default_factory=dict)
    """Digests by step."""
    error: str = ""
    contents: Contents | None = None
    pins: dict[str, int] = field(default_factory=dict)
    """Pinned steps by name; each names a snapshot that is there."""


@dataclass(slots=True)
class Report:
    """What was tried."""

    images: int = 0
    distinct: int = 0
    violations: list[str] = field(default_factory=list)

    def __add__(self, other: "Report") -> "Report":
        return Report(
            self.images + other.images,
            self.distinct + other.distinct,
            self.violations + other.violations,
        )

    def __str__(self) -> str:
        return (
            f"crash images: {self.images:,} ({self.distinct:,} distinct), "
            f"{len(self.violations)} violations"
        )


class Recoverer:
    """Recovers images of one store in one directory."""

    def __init__(self, root: Path, metadata: StoreMetadata) -> None:
        self.workspace = Workspace(root, STORE, ("LOCK",))
        self.paths, self.metadata = StorePaths(root / STORE), metadata
        self.memory = root / "memory"
        self.outcomes: dict[int, Outcome] = {}
        self._known: dict[object, State] = {}
        self._states: dict[int, State] = {}

    def outcome(self, image: Image) -> Outcome:
        """Recover an image unless an equal one was."""
        key = image.key
        known = self.outcomes.get(key)
        if known is None:
            self.workspace.put(image)
            known = self.outcomes[key] = self._outcome(image)
        return known

    def _outcome(self, image: Image) -> Outcome:
        booted = contextlib.nullcontext()
        if not image.same_boot:
            booted = mock.patch.object(memtable, "boot_id", return_value=ANOTHER_BOOT)  # type: ignore[assignment]
        try:
            with booted:
                if len(self.outcomes) % OPENED_EVERY == 0:
                    return self._open(image)
                return self._recover(image, self.workspace.disk)
        except Exception as error:  # whatever it is, it is what a user would see
            return Outcome(error=f"{type(error).__name__}: {error}")

    def record_recovery(self, image: Image) -> list[Operation]:
        """The operations with which an image is recovered."""
        self.workspace.put(image)
        disk = RecordingDisk()
        with contextlib.suppress(Exception):  # it is reported where the image is checked
            recover(Catalog(self.paths, self.metadata, disk), self.memory)
        self.workspace = Workspace(self.workspace.root, STORE, ("LOCK",))
        return disk.operations

    def _recover(self, image: Image, disk: Disk) -> Outcome:
        catalog = Catalog(self.paths, self.metadata, disk)
        recover(catalog, self.memory)
        manifest = catalog.manifest
        found = self._state_of(manifest, image)
        snapshots, pins = self._read_snapshots(catalog, image, found), self._read_pins(catalog)
        return Outcome(found.digest, found.step, snapshots, contents=found.contents, pins=pins)

    def _read(self, manifest: Manifest) -> State:
        """The tables that a manifest names, read as training reads them."""
        parts = check_files(self.paths, self.metadata, manifest)
        contents = {}
        for layer, spec in self.metadata.tables.items():
            table = Table(self.paths, self.metadata.store_id, spec, capacity=0)
            try:
                fill_table(table, parts[layer])
                contents[layer] = table.read_range(0, spec.rows)
            finally:
                table.close()
        state = make_state(manifest.step, manifest.marks, contents)
        return self._states.setdefault(state.digest, state)  # one of each is enough memory

    def _state_of(self, manifest: Manifest, image: Image) -> State:
        """As `_read`, but the same manifest with the same bytes in its files is read once."""
        beginnings = []
        for files in manifest.tables:
            layer = f"{STORE}/layers/{files.layer}"
            beginnings.append(f"{layer}/base/g{files.generation:04d}/")
            beginnings += [f"{layer}/segments/{ref.number:06d}/" for ref in files.segments]
        wanted = tuple(beginnings)
        touched = [path for path in self.workspace.touched if path.startswith(wanted)]
        named = {p: blob.key for p, blob in image.files.items() if p.startswith(wanted)}
        named |= {path: _content_key(self.workspace.root / path) for path in touched}
        key = manifest.step, manifest.marks, manifest.tables, frozenset(named.items())
        if key not in self._known:
            self._known[key] = self._read(manifest)
        return self._known[key]

    def _read_snapshots(self, catalog: Catalog, image: Image, found: State) -> dict[int, int]:
        digests = {}
        for step in catalog.snapshots():
            manifest = catalog.find_snapshot(step)
            if (manifest.step, manifest.tables) == (found.step, catalog.manifest.tables):
                digests[step] = make_state(step, manifest.marks, found.contents).digest
            else:
                digests[step] = self._state_of(manifest, image).digest
        return digests

    def _read_pins(self, catalog: Catalog) -> dict[str, int]:
        """Raises: SnapshotMismatchError: one names no snapshot, or another one."""
        pins = read_pins(self.paths, self.metadata.store_id)
        return {pin.name: catalog.find_snapshot(pin.name).step for pin in pins}

    def _open(self, image: Image) -> Outcome:
        """As a user would: open, read, look at the snapshots, close."""
        slots = 2 * BLOCK_SLOTS * slot_bytes(list(self.metadata.tables.values()))
        store = engram_store.open(
            self.paths.root,
            "train",
            overlay_bytes=slots,
            memtable_dir=self.memory,
            disk=self.workspace.disk,
        )
        with store:
            found = make_state(store.step, store.marks, tables_of(store))
            found = self._states.setdefault(found.digest, found)
            catalog = Catalog(self.paths, self.metadata, self.workspace.disk)
            snapshots, pins = self._read_snapshots(catalog, image, found), self._read_pins(catalog)
        return Outcome(found.digest, found.step, snapshots, contents=found.contents, pins=pins)


def judge(outcome: Outcome, truth: Truth, recording: Recording) -> str | None:
    """What is wrong with an outcome, in words; None: nothing."""
    if outcome.error:
        return f"recovery failed with {outcome.error}"
    if outcome.digest not in {state.digest for state in truth.states}:
        wanted = " or ".join(f"step {step}" for step in sorted({s.step for s in truth.states}))
        return f"{_found(outcome, recording, truth)} was found instead of {wanted}"
    for step, digest in truth.required.items():
        if step <= outcome.step and outcome.snapshots.get(step) != digest:
            what = "is another one" if step in outcome.snapshots else "is gone"
            return f"the snapshot at step {step} {what}"
    for step, digest in outcome.snapshots.items():
        if digest not in truth.possible.get(step, ()) and (step, digest) != (
            outcome.step,
            outcome.digest,
        ):
            return f"a snapshot at step {step} is there that nobody made, or another one"
    if outcome.pins not in truth.pins:
        wanted = " or ".join(str(dict(pins)) for pins in truth.pins)
        return f"the pins are {outcome.pins} instead of {wanted}"
    return None


def _found(outcome: Outcome, recording: Recording, truth: Truth) -> str:
    known = {call.after.digest: call.after.step for call in recording.calls}
    known[recording.initial.digest] = 0
    if outcome.digest in known:
        return f"step {known[outcome.digest]} of this or another lineage"
    assert outcome.contents is not None
    state = truth.states[0]
    differences = []
    for layer, (rows, columns) in outcome.contents.items():
        wanted, wanted_columns = state.contents[layer]
        different = (rows != wanted).any(1) | (columns != wanted_columns).any(1)
        differences.append(f"{int(different.sum())} rows of layer {layer}")
    return f"a mixture ({' and '.join(differences)} are not those of step {state.step})"


@dataclass(slots=True)
class Effort:
    """How many images to look at."""

    subsets: int = 2
    """Random subsets of unsynced changes at each moment."""
    cuts: int = 2
    """Places at which an operation of a dying process is cut."""
    boots: int = 8
    """Every so many moments: memory files of another boot are there."""
    chains: int = 0
    """Recoveries that are recorded themselves and crash at each of their operations."""
    stop_at: int = 0
    """Violations; 0: never."""
    during: frozenset[str] = frozenset()
    """Look only at moments in calls of these kinds; none: at all moments."""


class Explorer:
    """Goes through the images of one recording."""

    def __init__(self, recording: Recording, root: Path, effort: Effort, seed: int) -> None:
        self.recording, self.effort = recording, effort
        self.recoverer = Recoverer(root, recording.metadata)
        self.report = Report()
        self.rng = np.random.default_rng(seed)

    def run(self) -> Report:
        with _quiet():
            self._explore()
        self.report.distinct = len(self.recoverer.outcomes)
        return self.report

    @property
    def _enough(self) -> bool:
        return 0 < self.effort.stop_at <= len(self.report.violations)

    def _explore(self) -> None:
        recording, files = self.recording, self.recording.start.copy()
        count = len(recording.operations)
        chained = set(self.rng.permutation(count)[: self.effort.chains].tolist())
        for index in range(count + 1):
            if not self._looks_at(index):
                if index < count:
                    files.apply(recording.operations[index])
                continue
            dead, lost = (recording.truth(index, lost=way) for way in (False, True))
            where = f"{recording.name}; after {index} of {count} operations"
            if index < count:
                where += f", before {words_of(recording.operations[index], files)}"
            for image, truth in self._images(files, index, dead, lost):
                self._check(image, truth, where)
                if self._enough:
                    return
            if index in chained:
                self._chain(files, dead, lost, where)
            if index < count:
                files.apply(recording.operations[index])

    def _looks_at(self, index: int) -> bool:
        during, calls = self.effort.during, self.recording.calls
        here = (call for call in calls if call.begin <= index <= call.end)
        return not during or any(call.kind in during for call in here)

    def _images(
        self, files: FileSystem, index: int, dead: Truth, lost: Truth
    ) -> Iterator[tuple[Image, Truth]]:
        effort, operations = self.effort, self.recording.operations
        yield dead_process(files), dead
        if index < len(operations):
            for image in torn_operation(files, operations[index], self.rng, effort.cuts):
                yield image, dead
        boot = index % effort.boots == 0
        for image in lost_host(files, self.rng, effort.subsets, memory=boot):
            yield image, lost

    def _check(self, image: Image, truth: Truth, where: str) -> None:
        self.report.images += 1
        wrong = judge(self.recoverer.outcome(image), truth, self.recording)
        if wrong is not None:
            self.report.violations.append(f"{where}, {image.words}: {wrong}")

    # ------------------------------------------------------------------ crashes of recoveries

    def _chain(self, files: FileSystem, dead: Truth, lost: Truth, where: str) -> None:
        """A process or a host died, and another one dies while it recovers."""
        died = files.copy()
        died.end_process()
        self._crash_again(died, dead_process(died), (dead, lost), where)
        images = list(lost_host(files, self.rng, self.effort.subsets))
        image = images[int(self.rng.integers(len(images)))]
        again = FileSystem.of_image(self.recoverer.workspace.root, STORE, image)
        self._crash_again(again, image, (lost, lost), where)

    def _crash_again(
        self, files: FileSystem, image: Image, truths: tuple[Truth, Truth], where: str
    ) -> None:
        recovered = self.recoverer.outcome(image)
        operations = self.recoverer.record_recovery(image)
        dead, lost = (_also(truth, recovered, self.recording) for truth in truths)
        if image.memory:
            dead = _only(dead, recovered)
        for index, operation in enumerate(operations):
            place = f"{where}, {image.words}; after {index} of {len(operations)} operations of "
            place += f"the recovery, before {words_of(operation, files)}"
            self._check(dead_process(files), dead, place)
            for torn in torn_operation(files, operation, self.rng, 1):
                self._check(torn, dead, place)
            for loss in lost_host(files, self.rng, self.effort.subsets // 2):
                self._check(loss, lost, place)
            if self._enough:
                return
            files.apply(operation)
        place = f"{where}, {image.words}; after the recovery"
        for loss in lost_host(files, self.rng, self.effort.subsets):
            self._check(loss, _only(lost, recovered), place)


def _also(truth: Truth, recovered: Outcome, recording: Recording) -> Truth:
    """A recovery keeps what it recovered as a snapshot."""
    possible = dict(truth.possible)
    known = possible.get(recovered.step, frozenset())
    possible[recovered.step] = known | {recovered.digest}
    states = (*truth.states, *_states(recovered, recording))
    return replace(truth, states=states, possible=possible)


def _only(truth: Truth, recovered: Outcome) -> Truth:
    states = tuple(state for state in truth.states if state.digest == recovered.digest)
    return replace(truth, states=states or truth.states)


def _states(outcome: Outcome, recording: Recording) -> list[State]:
    """The state with an outcome's digest; none if it was wrong, which is reported elsewhere."""
    states = [recording.initial, *(call.after for call in recording.calls)]
    return [state for state in states if state.digest == outcome.digest][:1]


def words_of(operation: Operation, files: FileSystem) -> str:
    """An operation for people."""
    words = f"{operation.kind} {files.relative(operation.path)}"
    if operation.target is not None:
        words += f" to {files.relative(operation.target)}"
    if operation.data:
        words += f" ({len(operation.data)} bytes at {operation.offset})"
    return words


def _content_key(path: Path) -> int:
    """Of a file, 0 for a directory and 1 for nothing."""
    if path.is_dir():
        return 0
    return Blob(path.read_bytes()).key if path.exists() else 1


@contextlib.contextmanager
def crash_directory() -> Iterator[Path]:
    """A directory on a tmpfs: tens of thousands of stores are written to it and read back."""
    path = Path(tempfile.mkdtemp(prefix="engram-store-crash-", dir=SHARED_MEMORY))
    try:
        yield path
    finally:
        shutil.rmtree(path)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Recovery warns of what it finds, tens of thousands of times."""
    logger = logging.getLogger("engram_store")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)
