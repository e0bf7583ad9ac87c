"""Durability beyond the process: journals written, replayed, broken and given up."""

import errno
import shutil
import struct
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xxhash

import engram_store
from engram_store.engine import Engine
from engram_store.engine.recovery import RecoveryKind
from engram_store.errors import ConfigError, DiskFullError, StoreFileError
from engram_store.layout.journal import (
    StepRecord,
    file_header,
    journal_number,
    read_records,
    record_parts,
)
from engram_store.layout.manifest import Mark
from engram_store.layout.paths import StorePaths
from engram_store.recipes import Recipe
from engram_store.testing import FaultyDisk
from engram_store.types import Durability, TableSpec
from tests.pairs import MakePair, Pair, assert_same_tables, specs_of, tiny_overlay_bytes

SECONDS = 30.0
STORE = "ab" * 16
SPECS = [TableSpec(layer=1, rows=50, dim=4), TableSpec(layer=2, rows=60, dim=2)]


def lose_host(pair: Pair) -> Path:
    """What another host would find on the disk: everything but shared memory."""
    copy = pair.path.with_name("after the power cut.engram")
    shutil.rmtree(copy, ignore_errors=True)
    engine = pair.store._engine
    assert isinstance(engine, Engine)
    # Copying takes time, a power cut does not: nothing may change meanwhile.
    with engine._commit_lock:
        engine._background.drain()
        shutil.copytree(pair.path, copy, symlinks=True)
    return copy


def expect(path: Path, pair: Pair, kind: RecoveryKind) -> None:
    """The store there is exactly the oracle, and trains on."""
    with engram_store.open(path, "train") as store:
        assert store.recovery is not None
        assert store.recovery.kind is kind
        assert store.step == pair.oracle.step
        assert_same_tables(store, pair.oracle)
        Pair(store, pair.oracle, pair.rng).train(1)


def wait_durable(pair: Pair) -> None:
    """Until every applied step is durable."""
    for _ in range(int(SECONDS / 0.01)):
        if pair.store.durable_step == pair.store.step:
            return
        threading.Event().wait(0.01)
    raise AssertionError(f"durable {pair.store.durable_step} of {pair.store.step}")


# ---------------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("text", "journaled", "seconds"),
    [("snapshot", False, 0), ("step", True, 0), ("group(20)", True, 0.02)],
)
def test_durability_has_three_forms(text: str, *, journaled: bool, seconds: float) -> None:
    assert Durability.parse(text) == Durability(journaled=journaled, group_seconds=seconds)


@pytest.mark.parametrize("text", ["", "group", "group()", "group(0)", "group(x)", "group(99999)"])
def test_other_forms_are_refused_with_those_allowed(text: str) -> None:
    with pytest.raises(ConfigError, match=r"'snapshot', 'step' and 'group\(MS\)'"):
        Durability.parse(text)


# ---------------------------------------------------------------------- host losses


def test_in_step_mode_a_lost_host_loses_nothing(make_pair: MakePair) -> None:
    """Every commit that returned is there, whatever was sealed in between."""
    pair = make_pair(options={"durability": "step"})
    for _ in range(4):
        pair.train(1)
        assert pair.store.durable_step == pair.step
    pair.store.seal()
    pair.train(2)

    expect(lose_host(pair), pair, RecoveryKind.REPLAYED)


def test_in_group_mode_a_lost_host_loses_at_most_what_was_not_durable(make_pair: MakePair) -> None:
    pair = make_pair(options={"durability": "group(5)"})
    pair.train(5)
    wait_durable(pair)

    expect(lose_host(pair), pair, RecoveryKind.REPLAYED)


def test_memtables_that_come_and_go_leave_no_journal_behind(
    make_pair: MakePair, recipe: Recipe
) -> None:
    """With the smallest overlay: many seals, some under way when the host is lost."""
    overlay = tiny_overlay_bytes(specs_of(recipe))
    for durability in ("step", "group(1)"):
        pair = make_pair(
            name=durability, options={"durability": durability, "overlay_bytes": overlay}
        )
        pair.train(60)
        wait_durable(pair)
        assert pair.store.stats().seals > 3
        assert len(StorePaths(pair.path).journal_files()) <= 2

        expect(lose_host(pair), pair, RecoveryKind.REPLAYED)


def test_without_a_journal_a_lost_host_goes_back_to_its_snapshot(make_pair: MakePair) -> None:
    pair = make_pair()
    pair.train(2)
    pair.snapshot()
    assert pair.store.durable_step == 2
    pair.train(3)
    pair.store.seal()
    assert pair.store.durable_step == 2

    pair.oracle.restore(2)
    expect(lose_host(pair), pair, RecoveryKind.ROLLED_BACK)


def test_going_back_forgets_the_journal(make_pair: MakePair) -> None:
    """Steps of the forgotten future must not be replayed on top of the snapshot."""
    pair = make_pair(options={"durability": "step"})
    pair.train(2)
    start = pair.snapshot()
    pair.train(3)
    pair.restore(start)
    assert pair.store.durable_step == 2
    expect(lose_host(pair), pair, RecoveryKind.REPLAYED)

    pair.oracle.restore(2)
    pair.train(2)
    expect(lose_host(pair), pair, RecoveryKind.REPLAYED)


def test_a_killed_process_continues_from_memory_not_from_the_journal(make_pair: MakePair) -> None:
    """In group mode memory has more than the journal; both files go when the store is closed."""
    pair = make_pair(options={"durability": "group(60000)"})
    pair.train(3)
    assert pair.store.durable_step == 0
    pair.store.close()
    assert StorePaths(pair.path).journal_files() == []
    expect(pair.path, pair, RecoveryKind.CLEAN)


def test_whoever_listens_is_told_of_durable_steps(make_pair: MakePair) -> None:
    pair = make_pair(options={"durability": "step"})
    heard: list[int] = []
    pair.store.when_durable(heard.append)
    pair.train(3)
    assert heard == [1, 2, 3]


# ---------------------------------------------------------------------- damage and full disks


def test_a_torn_record_ends_the_replay(make_pair: MakePair) -> None:
    """Cut anywhere in the last record, the store is what it was one step before."""
    pair = make_pair(options={"durability": "step"})
    pair.train(2)
    journal = StorePaths(pair.path).journal_files()[-1]
    whole = journal.stat().st_size
    before = pair.oracle.step
    pair.train(1)
    last = journal.stat().st_size - whole
    for cut in (1, last // 2, last - 1, last):
        path = lose_host_cut(pair, journal, cut)
        with engram_store.open(path, "train") as store:
            assert store.step == before


def lose_host_cut(pair: Pair, journal: Path, cut: int) -> Path:
    """As `lose_host`, with the last bytes of the journal missing."""
    path = lose_host(pair)
    copy = path / journal.relative_to(pair.path)
    with copy.open("r+b") as file:
        file.truncate(max(copy.stat().st_size - cut, 0))
    return path


@pytest.fixture
def disk() -> Iterator[FaultyDisk]:
    disk = FaultyDisk()
    yield disk
    disk.heal()


@pytest.mark.parametrize("kinds", [{"write"}, {"sync"}])
def test_a_step_that_cannot_be_made_durable_is_not_applied(
    make_pair: MakePair, disk: FaultyDisk, kinds: set[str]
) -> None:
    """Refused as a whole; it may be committed again when there is space, and then is durable."""
    pair = make_pair(options={"durability": "step", "disk": disk})
    pair.train(2)
    window = pair.announce(np.arange(40).reshape(2, 20), 2)
    window.push_random(pair.rng)
    disk.fail(errno.ENOSPC, forever=True, kinds=kinds)
    for _ in range(3):
        with pytest.raises(DiskFullError):
            pair.store.commit(2, 0.1)
        assert (pair.store.step, pair.store.durable_step) == (2, 2)
    disk.heal()
    pair.commit()
    assert pair.store.durable_step == 3
    expect(lose_host(pair), pair, RecoveryKind.REPLAYED)


def test_a_failed_sync_is_not_tried_again(make_pair: MakePair, disk: FaultyDisk) -> None:
    """What it left on the disk is unknown: the memtable is sealed, and a new journal begun."""
    pair = make_pair(options={"durability": "step", "disk": disk})
    pair.train(2)
    first = StorePaths(pair.path).journal_files()
    window = pair.announce(np.arange(40).reshape(2, 20), 2)
    window.push_random(pair.rng)
    disk.fail(errno.EIO, kinds={"sync"})
    with pytest.raises(StoreFileError, match="could not be made durable"):
        pair.store.commit(2, 0.1)
    assert pair.store.durable_step == 2

    pair.commit()
    assert pair.store.durable_step == 3
    assert pair.store.stats().seals == 1
    assert not set(first) & set(StorePaths(pair.path).journal_files())
    expect(lose_host(pair), pair, RecoveryKind.REPLAYED)


def test_in_group_mode_a_broken_journal_becomes_a_seal(
    make_pair: MakePair, disk: FaultyDisk
) -> None:
    """Commits go on meanwhile; nothing is called durable before it is."""
    pair = make_pair(options={"durability": "group(1)", "disk": disk})
    pair.train(1)
    wait_durable(pair)
    disk.fail(errno.EIO, forever=True, kinds={"sync"})
    pair.train(3)
    threading.Event().wait(0.1)
    assert pair.store.durable_step == 1
    disk.heal()
    wait_durable(pair)
    pair.train(1)
    wait_durable(pair)
    expect(lose_host(pair), pair, RecoveryKind.REPLAYED)


# ---------------------------------------------------------------------- the bytes


def record(step: int, n: int = 3) -> StepRecord:
    rng = np.random.default_rng(step)
    tables = tuple(
        (
            rng.integers(0, spec.rows, n).astype(np.int32),
            rng.standard_normal((n, spec.state_width)).astype(np.float32),
            rng.integers(0, 9, (n, spec.dim)).astype(spec.dtype.storage),
        )
        for spec in SPECS
    )
    return StepRecord(step, (Mark(session="ef" * 16, epoch=2, step=step - 1, part=1),), tables)


def write(path: Path, *records: StepRecord, number: int = 7) -> bytes:
    parts: list[Any] = [file_header(STORE, 3, number, SPECS)]
    for one in records:
        parts += record_parts(STORE, number, one)
    path.write_bytes(b"".join(bytes(part) for part in parts))
    return path.read_bytes()


def same(ours: StepRecord, theirs: StepRecord) -> bool:
    return (ours.step, ours.marks) == (theirs.step, theirs.marks) and all(
        a.tobytes() == b.tobytes() and a.shape == b.shape and a.dtype == b.dtype
        for a, b in zip(
            (array for columns in ours.tables for array in columns),
            (array for columns in theirs.tables for array in columns),
            strict=True,
        )
    )


def test_a_journal_byte_by_byte(tmp_path: Path) -> None:
    """docs/format.md: file header, record header, marks, counts, arrays."""
    one = record(4, 2)
    data = write(tmp_path / "000007", one)
    assert data[:8] == b"ENGRJRN1"
    assert data[8:40] == STORE.encode()
    lineage, number, layout, checksum = struct.unpack_from("<4Q", data, 40)
    assert (lineage, number) == (3, 7)
    shapes = "/".join(str((s.layer, s.rows, s.row_bytes, s.state_bytes)) for s in SPECS)
    assert layout == xxhash.xxh3_64_intdigest(shapes.encode())
    assert checksum == xxhash.xxh3_64_intdigest(data[:64])

    body = data[72:]
    checksum, length, step, tables, marks = struct.unpack_from("<3Q2I", body)
    assert (length, step, tables, marks) == (len(body), 4, 2, 1)
    seed = xxhash.xxh3_64_intdigest(f"{STORE}/journal/7".encode())
    assert checksum == xxhash.xxh3_64_intdigest(body[8:], seed)
    assert body[32:64] == b"ef" * 16
    assert struct.unpack_from("<3Q", body, 64) == (2, 3, 1)
    assert struct.unpack_from("<2Q", body, 88) == (2, 2)
    arrays = [array.tobytes() for columns in one.tables for array in columns]
    assert body[104:] == b"".join(arrays)


def test_records_come_back_as_they_were(tmp_path: Path) -> None:
    """Also one that changes no row."""
    path = tmp_path / "000007"
    given = (record(4), record(5, 0), record(6, 1))
    write(path, *given)
    assert journal_number(path, STORE, 3, SPECS) == 7
    read = list(read_records(path, STORE, 7, SPECS))
    assert len(read) == 3
    assert all(map(same, given, read))


@pytest.mark.parametrize(
    "of",
    [
        lambda path: journal_number(path, "cd" * 16, 3, SPECS),
        lambda path: journal_number(path, STORE, 4, SPECS),
        lambda path: journal_number(path, STORE, 3, SPECS[:1]),
    ],
    ids=["store", "lineage", "tables"],
)
def test_the_journal_of_something_else_is_none(
    tmp_path: Path, of: Callable[[Path], int | None]
) -> None:
    write(tmp_path / "000007", record(1))
    assert of(tmp_path / "000007") is None


def test_every_flipped_bit_is_found(tmp_path: Path) -> None:
    """Of header and records: what was changed and all that follows is not there."""
    path = tmp_path / "000007"
    whole = write(path, record(4), record(5))
    header = len(file_header(STORE, 3, 7, SPECS))
    first = header + sum(part.size for part in record_parts(STORE, 7, record(4)))
    for position in range(len(whole)):
        for bit in (0, 7):
            changed = bytearray(whole)
            changed[position] ^= 1 << bit
            path.write_bytes(changed)
            if position < header:
                assert journal_number(path, STORE, 3, SPECS) is None
            else:
                left = list(read_records(path, STORE, 7, SPECS))
                assert len(left) == (0 if position < first else 1)


def test_a_record_of_another_memtable_is_none(tmp_path: Path) -> None:
    """Its checksum is seeded with the number, so blocks that a disk mixed up are found."""
    path = tmp_path / "000007"
    write(path, record(4), number=7)
    assert list(read_records(path, STORE, 8, SPECS)) == []
