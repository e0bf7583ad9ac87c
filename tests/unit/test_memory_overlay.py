"""Memtables that are sealed early where the page cache starves: exact, safe, and smaller."""

import errno
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import engram_store
from engram_store.engine import overlay
from engram_store.engine.cold import Paging
from engram_store.engine.engine import Engine
from engram_store.engine.extents import BLOCK_SLOTS
from engram_store.engine.memory_plan import plan_memory
from engram_store.engine.memtable import Memtable, memtable_bytes
from engram_store.engine.overlay import RoomRule
from engram_store.errors import SharedMemoryFullError
from engram_store.layout.disk import Disk
from engram_store.recipes import Recipe
from engram_store.store import Store
from engram_store.testing import FaultyDisk
from tests.crash.faults import abandon
from tests.pairs import MakePair, Pair, random_tokens, specs_of, tiny_overlay_bytes

BLOCKS = 4
CAPACITY = BLOCKS * BLOCK_SLOTS
STARVED, CALM = (1000, 900), (1000, 0)


# ---------------------------------------------------------------------- when


def steps(rule: RoomRule, count: int, counted: tuple[int, int], step_rows: int = 500) -> int:
    """So many steps alike; how often the size changed."""
    return sum(rule.saw(*counted, step_rows) for _ in range(count))


def test_memtables_shrink_by_quarters_while_pages_do_not_last() -> None:
    """Down to a quarter, and no further."""
    rule = RoomRule(CAPACITY)
    sizes = [rule.slots for _ in range(40) if rule.saw(*STARVED, 500)]
    assert sizes == [3 * BLOCK_SLOTS, 2 * BLOCK_SLOTS, BLOCK_SLOTS]
    assert (rule.shrunk, rule.grown) == (3, 0)


def test_they_grow_again_slowly_once_pages_last() -> None:
    """Sixteen times as slowly as they shrank."""
    rule = RoomRule(CAPACITY)
    steps(rule, 12, STARVED)
    assert rule.slots == BLOCK_SLOTS
    assert steps(rule, 63, CALM) == 0
    assert steps(rule, 1, CALM) == 1
    assert rule.slots == 2 * BLOCK_SLOTS
    steps(rule, 128, CALM)
    assert rule.slots == CAPACITY
    assert (rule.shrunk, rule.grown) == (3, 3)
    assert steps(rule, 200, CALM) == 0


def test_a_few_bad_steps_are_no_reason() -> None:
    """Three of eight, as after somebody emptied the page cache; nor many steps of few faults."""
    rule = RoomRule(CAPACITY)
    for _ in range(5):
        assert not steps(rule, 3, STARVED)
        assert not steps(rule, 6, CALM)
    assert not steps(rule, 50, (100_000, 9_000))
    assert not steps(rule, 50, (100, 60))
    assert rule.slots == CAPACITY


@given(
    st.integers(1, 64),
    st.lists(
        st.tuples(st.integers(0, 10**6), st.integers(0, 10**6), st.integers(0, 1 << 18)),
        max_size=200,
    ),
)
def test_one_step_always_fits(blocks: int, seen: list[tuple[int, int, int]]) -> None:
    """Whole blocks, never more than there are, and room for the largest step so far."""
    rule = RoomRule(blocks * BLOCK_SLOTS)
    largest = 0
    for rows, faults, step_rows in seen:
        step_rows = min(step_rows, rule.capacity)
        rule.saw(rows, faults, step_rows)
        largest = max(largest, step_rows)
        assert rule.slots % BLOCK_SLOTS == 0
        assert max(largest, 1) <= rule.slots <= rule.capacity


# ---------------------------------------------------------------------- memory


def allocated(path: Path) -> int:
    """Bytes of a file that take memory, or disk."""
    return 512 * path.stat().st_blocks


def about(size: int, expected: int) -> bool:
    """Equal, but for what a file system needs to know where a file's pieces are."""
    return abs(size - expected) <= 32 << 10


@pytest.fixture
def memtable(recipe: Recipe, tmp_path: Path) -> Iterator[Memtable]:
    made = Memtable(tmp_path / "memtable-0", list(specs_of(recipe).values()), CAPACITY, Disk())
    yield made
    made.close()


def test_what_is_given_back_is_free_and_the_rest_is_unharmed(
    memtable: Memtable, recipe: Recipe
) -> None:
    """The file keeps its length, by which recovery knows it."""
    specs = list(specs_of(recipe).values())
    for slots in memtable.tables:
        slots.ids[:], slots.rows[:], slots.state[:] = 7, 8, 9
    before, length = allocated(memtable.path), memtable.path.stat().st_size
    assert before >= length == memtable_bytes(specs, CAPACITY)

    memtable.give_back(BLOCK_SLOTS)

    assert memtable.backed == BLOCK_SLOTS
    assert about(before - allocated(memtable.path), memtable.bytes_of(3 * BLOCK_SLOTS))
    assert memtable.path.stat().st_size == length
    for slots in memtable.tables:
        for array, value in ((slots.ids, 7), (slots.rows, 8), (slots.state, 9)):
            assert (array[:BLOCK_SLOTS] == value).all()
            assert not array[BLOCK_SLOTS:].any()


def test_memory_can_be_had_again(memtable: Memtable) -> None:
    """All of it, so that no store is one into a hole, which a full tmpfs answers by SIGBUS."""
    before = allocated(memtable.path)
    memtable.give_back(BLOCK_SLOTS)
    memtable.reserve(2 * BLOCK_SLOTS)
    assert memtable.backed == 2 * BLOCK_SLOTS
    assert about(before - allocated(memtable.path), memtable.bytes_of(2 * BLOCK_SLOTS))
    memtable.reserve(CAPACITY)
    assert about(allocated(memtable.path), before)
    memtable.reserve(BLOCK_SLOTS)
    assert memtable.backed == CAPACITY


# ---------------------------------------------------------------------- in training


class Starving:
    """A store whose page cache is said to starve, or not."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.counted = CALM
        monkeypatch.setattr(Paging, "counted", lambda paging: self.counted)


@pytest.fixture
def starving(monkeypatch: pytest.MonkeyPatch) -> Starving:
    return Starving(monkeypatch)


@pytest.fixture
def memory(tmp_path: Path) -> Path:
    (tmp_path / "memory").mkdir()
    return tmp_path / "memory"


def options(recipe: Recipe, memory: Path, **more: Any) -> dict[str, Any]:
    size = tiny_overlay_bytes(specs_of(recipe), BLOCKS)
    return {"overlay_bytes": size, "memtable_dir": memory, **more}


def engine_of(store: Store) -> Engine:
    assert isinstance(store._engine, Engine)
    return store._engine


def files_size(memory: Path) -> int:
    return sum(allocated(path) for path in memory.rglob("memtable-*"))


def big_step(pair: Pair) -> None:
    """More rows than a block of slots has."""
    window = pair.announce(random_tokens(pair.rng, (20, 200)), pair.step)
    window.push_random(pair.rng)
    pair.commit()


def test_a_starving_store_seals_earlier_and_its_tables_are_the_same(
    make_pair: MakePair, recipe: Recipe, memory: Path, starving: Starving
) -> None:
    """Memory is given back at once, not when it is next used; and taken again when it is calm."""
    pair = make_pair(options=options(recipe, memory))
    engine, whole = engine_of(pair.store), files_size(memory)
    pair.train(12)
    assert engine.seals == 0
    assert files_size(memory) == whole

    starving.counted = STARVED
    pair.train(20)
    assert engine.overlay.rule.slots == BLOCK_SLOTS
    assert engine.seals > 2
    pair.train(5)  # both memtables were opened since
    pair.store.seal()
    assert files_size(memory) < whole // 2
    assert about(files_size(memory), engine.overlay.used_bytes)
    pair.check()

    starving.counted = CALM
    pair.train(200, windows=1, shape=(1, 20))
    assert engine.overlay.rule.slots == CAPACITY
    for _ in range(2):
        pair.train(1)
        pair.store.seal()
    assert about(files_size(memory), whole)
    pair.check()


def test_nothing_is_lost_by_a_kill_while_memtables_are_small(
    make_pair: MakePair, recipe: Recipe, memory: Path, starving: Starving
) -> None:
    """Killed after every few steps, sealed or not, shrunk or grown."""
    pair = make_pair(options=options(recipe, memory))
    pair.oracle.snapshot()
    for round_number in range(6):
        starving.counted = STARVED if round_number % 3 < 2 else CALM
        pair.train(5 + round_number)
        abandon(pair.store)
        store = engram_store.open(pair.path, "train", **options(recipe, memory))
        assert store.step == pair.oracle.step
        pair = Pair(store, pair.oracle, pair.rng)
        pair.check()
    pair.store.close()


def test_a_step_larger_than_a_small_memtable_takes_memory_again(
    make_pair: MakePair, recipe: Recipe, memory: Path, starving: Starving
) -> None:
    """It fits into the memtable as it was opened, so it is never refused for its size."""
    pair = make_pair(options=options(recipe, memory))
    starving.counted = STARVED
    pair.train(30)
    assert engine_of(pair.store).overlay.rule.slots == BLOCK_SLOTS

    big_step(pair)
    big_step(pair)

    assert engine_of(pair.store).overlay.rule.slots > BLOCK_SLOTS
    pair.train(3)
    pair.check()


def test_memory_that_is_gone_is_a_refusal_and_no_kill(
    make_pair: MakePair,
    recipe: Recipe,
    memory: Path,
    starving: Starving,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Somebody else took what was given back: the step is refused whole, and can be repeated."""
    pair = make_pair(options=options(recipe, memory))
    starving.counted = STARVED
    pair.train(30)
    window = pair.announce(random_tokens(pair.rng, (20, 200)), pair.step)
    window.push_random(pair.rng)
    before = pair.step

    with monkeypatch.context() as full:
        full.setattr(overlay, "memory_headroom_bytes", lambda: 5000)
        with pytest.raises(SharedMemoryFullError, match="the memory limit leaves 5,000"):
            pair.store.commit(before, 0.1)
        assert pair.store.step == before

    pair.commit()
    pair.check()


def test_memtables_stay_small_where_there_is_no_memory_to_grow(
    make_pair: MakePair,
    recipe: Recipe,
    memory: Path,
    starving: Starving,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Shared memory beyond the limit of a cgroup would kill the process."""
    pair = make_pair(options=options(recipe, memory))
    starving.counted = STARVED
    pair.train(30)
    pair.store.seal()
    small = files_size(memory)
    monkeypatch.setattr(overlay, "memory_headroom_bytes", lambda: 0)
    starving.counted = CALM

    pair.train(200, windows=1, shape=(1, 20))
    pair.train(12)

    assert engine_of(pair.store).overlay.rule.slots == CAPACITY
    assert files_size(memory) <= small
    pair.check()


@pytest.mark.parametrize("at", [1, 2, 5])
def test_a_disk_that_gives_no_memory_back_harms_nothing(
    make_pair: MakePair, recipe: Recipe, memory: Path, starving: Starving, at: int
) -> None:
    """Half of a memtable's memory may be gone: what is used again is reserved first."""
    disk = FaultyDisk()
    pair = make_pair(options=options(recipe, memory, disk=disk))
    disk.fail(errno.EOPNOTSUPP, at, forever=True, kinds={"discard"})
    starving.counted = STARVED
    pair.train(30)
    assert disk.fired
    disk.heal()
    starving.counted = CALM
    big_step(pair)
    pair.train(200, windows=1, shape=(1, 20))
    pair.train(12)
    pair.check()


# ---------------------------------------------------------------------- the page cache


def test_only_a_quarter_of_the_page_cache_is_read_at_a_time(recipe: Recipe) -> None:
    """Two slices of every table together; but never so few that a disk is idle."""
    specs = list(specs_of(recipe).values())
    for limit in (8 << 20, 64 << 20, 256 << 20, 1 << 30):
        plan = plan_memory(specs, limit)
        paging = Paging(plan=plan)
        rows = paging.slice_rows(specs[0].row_bytes, 8192)
        paging.close()
        assert rows == 128 or 2 * 4096 * rows * len(specs) <= plan.page_cache_bytes // 4
        assert 128 <= rows <= 8192
    assert rows == 8192


class _Asked:
    """Notes what is asked for, and reads nothing."""

    name = "none"

    def __init__(self) -> None:
        self.sizes: list[int] = []

    def start(self, ranges: np.ndarray[Any, Any]) -> None:
        self.sizes.append(int(ranges[:, 1].sum()))


def test_slices_are_as_small_as_memory_asks_for(make_pair: MakePair, recipe: Recipe) -> None:
    """Of windows and of commits, whose rows are the same with each page faulted in."""
    pair = make_pair()
    pair.train(3)
    pair.store.seal()
    paging, asked = pair.store._engine.paging, _Asked()
    limit = plan_memory(list(pair.store.tables.values()), 1 << 30).store_bytes + (9 << 20)
    paging._plan = plan_memory(list(pair.store.tables.values()), limit)
    paging.reader = asked
    size = paging.slice_rows(pair.store.tables[1].row_bytes, 8192)
    for table in pair.store._engine.tables.values():
        for residency in paging._watched.values():
            residency.pages[:] = 0
        rows = np.arange(table.spec.rows, dtype=np.int32)
        table.gather(rows, [np.empty((rows.size, table.spec.dim), table.spec.dtype.storage)])
    assert size < 2000
    assert len(asked.sizes) == sum(-(-spec.rows // size) for spec in pair.store.tables.values())
    pair.check()


def test_a_window_too_large_for_the_page_cache_is_said_once(
    recipe: Recipe, caplog: pytest.LogCaptureFixture
) -> None:
    """Which settings to lower, with their values."""
    plan = plan_memory(list(specs_of(recipe).values()), 256 << 20)
    paging = Paging(plan=plan)
    caplog.clear()  # a new reader is told of too
    fits = int(plan.page_cache_bytes / 1.5 / 4096)
    paging.saw(100_000, fits, 0)
    assert not caplog.records
    for _ in range(3):
        paging.saw(100_000, fits + 2, 0)
    paging.close()
    assert len(caplog.records) == 1
    assert f"Lower overlay_bytes (now {plan.overlay_bytes}) or lookahead_bytes" in caplog.text


def test_rows_and_faults_are_counted_from_step_to_step(recipe: Recipe) -> None:
    """All tables together, whatever thread."""
    paging = Paging()
    paging.saw(100, 5, 1)
    paging.saw(50, 0, 2)
    assert paging.counted() == (150, 3)
    assert paging.counted() == (0, 0)
    paging.close()
