"""What a sweep of faults is made of: a disk that watches for broken promises, and a subject.

A subject is a store and its oracle. An operation is prepared, done with a fault at its n-th
change of a file, looked at, and done again without the fault; then training goes on.
"""

import errno
import gc
import hashlib
import os
import re
import shutil
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np

import engram_store
from engram_store.engine import Engine
from engram_store.engine.recovery import RecoveryKind
from engram_store.errors import EngramStoreError
from engram_store.layout.paths import StorePaths
from engram_store.layout.verify import verify_store
from engram_store.recipes import Recipe
from engram_store.store import Store
from engram_store.testing import FaultyDisk, MemorySession, Operation
from engram_store.testing.disk import CONTENT, NAMES
from tests.crash.summary import LINES
from tests.pairs import INITIAL, Pair, TwinWindow, make_oracle, random_tokens, tables_of

_T = TypeVar("_T")
SECONDS = 30.0
SHAPE = (2, 60)
"""Tokens of a window: with the least overlay a memtable holds two or three steps."""


@dataclass
class Counts:
    """Of all sweeps in this process, for the line at the end."""

    operations: int = 0
    """Operations of stores that were done with a fault armed."""
    injected: int = 0
    """Changes of files that failed."""
    violations: int = 0

    def add(self, fired: int, *, violation: bool = False) -> None:
        """One more operation."""
        self.operations += 1
        self.injected += fired
        self.violations += violation
        LINES["faults"] = (
            f"faults: {self.injected:,} injected in {self.operations:,} operations, "
            f"{self.violations} violations"
        )


counts = Counts()


class Fault(NamedTuple):
    """How the disk fails."""

    error: int
    """0: a write takes half of its bytes."""
    forever: bool = False

    @property
    def kinds(self) -> frozenset[str]:
        """What can fail in this way."""
        if not self.error:
            return frozenset({"write"})
        return CONTENT | NAMES | {"open_shared"}


FAULTS = {
    "full once": Fault(errno.ENOSPC),
    "full for ever": Fault(errno.ENOSPC, forever=True),
    "broken once": Fault(errno.EIO),
    "short write": Fault(0),
}


class WatchingDisk(FaultyDisk):
    """Also sees what a store must never do: rely on a file whose sync failed, or was left out."""

    def __init__(self) -> None:
        super().__init__()
        self.problems: list[str] = []
        self._unsynced: set[int] = set()
        self._given_up: set[int] = set()
        self._names: dict[Path, int] = {}
        self._new_names: set[Path] = set()
        self._lost_names: set[Path] = set()

    def _do(self, operation: Operation, action: Callable[[], _T]) -> _T:
        with self._lock:
            self._watch(operation)
            try:
                result = super()._do(operation, action)
            except OSError:
                if operation.kind == "sync":
                    self._given_up.add(operation.file)
                if operation.kind == "sync_directory":
                    # A directory that is there is synced again by whoever uses it; a file's new
                    # name may be lost for good.
                    self._lost_names |= {n for n in self._new_in(operation.path) if n.is_file()}
                raise
            self._note(operation)
            return result

    def _watch(self, operation: Operation) -> None:
        kind, file = operation.kind, operation.file
        if kind in ("write", "sync", "truncate") and file in self._given_up:
            self.problems.append(f"{kind} of {operation.path} after its sync failed")
        if kind in ("rename", "link"):
            number = self._names.get(operation.path)
            if number in self._given_up:
                self.problems.append(f"{kind} of {operation.path}, whose sync failed")
            if number in self._unsynced:
                self.problems.append(f"{kind} of {operation.path}, which was not synced")

    def _note(self, operation: Operation) -> None:
        kind, file = operation.kind, operation.file
        if kind == "create":
            self._names[operation.path] = file
        elif kind in ("write", "truncate"):
            self._unsynced.add(file)
        elif kind == "sync":
            self._unsynced.discard(file)
        elif kind == "unlink":
            self._names.pop(operation.path, None)
        elif kind == "rename" and operation.path in self._names:
            assert operation.target is not None
            self._names[operation.target] = self._names.pop(operation.path)
        self._note_name(operation)

    def _note_name(self, operation: Operation) -> None:
        kind, path = operation.kind, operation.path
        if kind in ("unlink", "remove_directory", "rename"):
            self._new_names.discard(path)
            self._lost_names.discard(path)
        if kind in ("create", "make_directory", "rename", "link"):
            name = operation.target or path
            self._new_names.add(name)
            self._lost_names.discard(name)
        if kind == "sync_directory":
            self._new_names -= self._new_in(path)

    def _new_in(self, directory: Path) -> set[Path]:
        return {name for name in self._new_names if name.parent == directory}

    def forgive(self) -> None:
        """Another process syncs the directories again; it cannot know of a sync that failed."""
        with self._lock:
            self._new_names |= self._lost_names
            self._lost_names = set()

    def doubtful_names(self) -> set[Path]:
        """Names that a lost host may not have. Nothing that was acknowledged may need one."""
        with self._lock:
            return {n for n in self._new_names | self._lost_names if os.path.lexists(n)}


def open_files() -> set[str]:
    """What this process has open, except what the interpreter opens as it likes."""
    gc.collect()
    found = set()
    for entry in Path("/proc/self/fd").iterdir():
        try:
            target = str(entry.readlink())
        except FileNotFoundError:
            continue
        if "engram" in target:
            found.add(target)
    return found


def digest_of(contents: dict[int, tuple[Any, Any]]) -> bytes:
    """Tells tables apart."""
    total = hashlib.blake2b()
    for _, (rows, state) in sorted(contents.items()):
        total.update(rows.tobytes())
        total.update(state.tobytes())
    return total.digest()


def oracle_digest(oracle: MemorySession) -> bytes:
    """As `digest_of` the tables of a store."""
    return digest_of({layer: (t.rows, t.state) for layer, t in oracle.contents.items()})


def abandon(store: Store) -> None:
    """Let go of a store as a killed process does: nothing is written, memtables stay."""
    engine = store._engine
    assert isinstance(engine, Engine)
    engine._let_go()
    engine._close_memtables()
    engine._lock.release()


class Subject:
    """A store on a faulty disk, and its oracle; opened again and again."""

    def __init__(
        self,
        path: Path,
        recipe: Recipe,
        durability: str,
        overlay_bytes: int,
        shared: Path,
        disk: WatchingDisk,
    ) -> None:
        self.path, self.durability, self.overlay_bytes = path, durability, overlay_bytes
        self.shared = shared
        self.disk = disk
        oracle: MemorySession = make_oracle(recipe, INITIAL)
        oracle.snapshot()
        self.history = {0: oracle_digest(oracle)}
        """Of the oracle after each step."""
        self.waiting: list[TwinWindow] = []
        """Windows of a step that was refused."""
        self.acknowledged = 0
        """The newest snapshot that was made."""
        self.pair = Pair(self.reopen(), oracle)

    @property
    def store(self) -> Store:
        return self.pair.store

    @property
    def journaled(self) -> bool:
        return self.durability != "snapshot"

    def reopen(self) -> Store:
        self.disk.forgive()
        store = engram_store.open(
            self.path,
            "train",
            overlay_bytes=self.overlay_bytes,
            durability=self.durability,
            fold_ratio=100,
            disk=self.disk,
        )
        assert self.shared.is_dir(), "no room in shared memory: this test needs a few megabytes"
        return store

    # ------------------------------------------------------------------ training

    def commit(self) -> None:
        """One step, or the rest of the one that was refused."""
        pair = self.pair
        if not self.waiting:
            tokens = [random_tokens(pair.rng, SHAPE) for _ in range(2)]
            windows = [pair.announce(each, pair.step) for each in tokens]
            for window in windows:
                window.push_random(pair.rng)
            self.waiting = windows
        pair.commit()
        self.waiting = []
        self.history[pair.step] = oracle_digest(pair.oracle)

    def train(self, steps: int) -> None:
        for _ in range(steps):
            self.commit()

    def snapshot(self) -> None:
        self.store.snapshot()
        self.pair.oracle.snapshot()
        self.acknowledged = self.pair.step

    def restore(self, step: int) -> None:
        self.store.restore(step)
        self.pair.oracle.restore(step)
        self.waiting = []
        self.acknowledged = step

    def trim(self) -> None:
        """Leave as few files as there can be, so that looking at all of them stays cheap."""
        self.snapshot()
        self.store.fold()
        self.store.keep_snapshots(1)

    def settle(self) -> None:
        """Wait until every step is durable, or that was refused."""
        if not self.journaled:
            return
        waiting = threading.Event()
        for _ in range(int(SECONDS / 0.002)):
            if self.disk.fired or self.store.durable_step == self.store.step:
                return
            waiting.wait(0.002)
        raise AssertionError(f"durable {self.store.durable_step} of {self.store.step}")

    def wait_durable(self) -> None:
        """Wait until every step is durable."""
        self.disk.fired = 0
        self.settle()

    # ------------------------------------------------------------------ what must hold

    def check_reads(self) -> None:
        """Reads go on, whatever the disk does."""
        for layer, table in self.pair.oracle.contents.items():
            ids = np.arange(table.spec.rows, dtype=np.int32)
            assert self.store.read_rows(layer, ids).tobytes() == table.rows.tobytes()

    def check_files(self) -> None:
        """Whatever is listed is whole, and every byte is sound."""
        engine = self.store._engine
        assert isinstance(engine, Engine)
        self.wait_durable()
        engine._background.drain()
        doubtful = {name for name in self.disk.doubtful_names() if not self._is_unused(name)}
        assert not doubtful, doubtful
        report = verify_store(StorePaths(self.path))
        assert report.ok, [f"{d.where}: {d.problem}" for d in report.damages]
        assert not self.disk.problems, self.disk.problems
        assert self.acknowledged in report.snapshots

    def _is_unused(self, name: Path) -> bool:
        """What a fold or a merge that failed has left, which nothing names."""
        match = re.search(r"/layers/(\d+)/(base/g|segments/)(\d+)", str(name))
        if match is None:
            return False
        engine = self.store._engine
        assert isinstance(engine, Engine)
        files = engine.catalog.manifest.table(int(match[1]))
        segments = {segment.number for segment in files.segments}
        return int(match[3]) not in (segments if match[2] == "segments/" else {files.generation})

    def check(self) -> None:
        """The store is the oracle, in memory and on the disk."""
        self.pair.check()
        self.check_files()

    def after_host_loss(self, durable: int) -> tuple[int, bytes]:
        """Step and tables that another host would find: at least as new as was promised."""
        copy = self.path.with_name("lost.engram")
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(self.path, copy, symlinks=True)
        with engram_store.open(copy, "train") as store:
            assert store.recovery is not None
            assert store.recovery.kind is not RecoveryKind.RECOVERED
            assert store.step >= max(durable, self.acknowledged), "an acknowledged step is gone"
            found = store.step, digest_of(tables_of(store))
        shutil.rmtree(copy)
        return found

    def lose_host(self) -> None:
        """Check it now, while nothing changes."""
        engine = self.store._engine
        assert isinstance(engine, Engine)
        self.wait_durable()
        with engine._commit_lock:
            engine._background.drain()
            step, found = self.after_host_loss(self.store.durable_step)
        assert found == self.history[step]

    def leave(self) -> None:
        """Close; nothing is left behind in this process or in shared memory."""
        self.pair.store.close()
        self.waiting = []
        del self.pair
        assert not self.shared.exists(), list(self.shared.iterdir())
        journals = StorePaths(self.path).journal_files()
        assert not journals, journals


def check_message(error: Exception, path: Path) -> None:
    """A person learns which file it was and what to do."""
    text = str(error)
    known = isinstance(error, EngramStoreError)
    assert known, f"{type(error).__name__}: {text} is none of ours"
    assert str(path) in text or "/dev/shm" in text, f"no file is named: {text}"  # noqa: S108
    assert ";" in text or ". " in text, f"no advice: {text}"
