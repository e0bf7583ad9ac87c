"""One memory setting: what it is divided into, and what is refused with which numbers."""

import re
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

import engram_store
from engram_store.engine import memory_plan
from engram_store.engine.engine import Engine
from engram_store.engine.memory import memory_limit_bytes, process_bytes
from engram_store.engine.memory_plan import check_plan, least_limit, plan_memory, store_plan
from engram_store.engine.memtable import slot_bytes
from engram_store.errors import ConfigError
from engram_store.recipes import Recipe
from engram_store.types import OptimizerKind, TableSpec
from tests.pairs import MakePair, MakeStore, specs_of

GIB = 1 << 30
LIMITS = st.integers(1, 64 << 30)


def tables(recipe: Recipe, rows: int, count: int = 1, optimizer: str = "adam") -> list[TableSpec]:
    """Some tables of so many rows."""
    spec = specs_of(recipe, optimizer=OptimizerKind(optimizer), dim=64)[1]
    return [replace(spec, layer=layer, rows=rows) for layer in range(count)]


@given(limit=LIMITS, rows=st.integers(1, 1 << 28), count=st.integers(1, 8))
def test_the_parts_are_the_whole(recipe: Recipe, limit: int, rows: int, count: int) -> None:
    """The page cache gets what nobody else does, and never less than nothing."""
    plan = plan_memory(tables(recipe, rows, count), limit)

    assert plan.page_cache_bytes == max(limit - plan.store_bytes, 0)
    assert plan.remap_bytes == 4 * rows * count
    assert plan.overlay_bytes == 2 * plan.capacity * slot_bytes(tables(recipe, rows, count))
    assert plan.overlay_bytes <= GIB or plan.capacity == 4096
    assert plan.staging_bytes <= min(2 * GIB, limit // 8)
    assert 4 * plan.in_flight_bytes * count <= plan.page_cache_bytes
    if plan.fits:
        assert plan.page_cache_bytes >= plan.least_page_cache_bytes > 0


@given(limit=LIMITS, more=LIMITS)
def test_more_memory_is_never_less_for_anyone(recipe: Recipe, limit: int, more: int) -> None:
    """Whoever raises the limit finds no part smaller."""
    specs = tables(recipe, 1 << 22)
    before, after = plan_memory(specs, limit), plan_memory(specs, limit + more)

    assert after.overlay_bytes >= before.overlay_bytes
    assert after.staging_bytes >= before.staging_bytes
    assert after.fits >= before.fits


@given(
    rows=st.integers(1, 1 << 26),
    count=st.integers(1, 8),
    overlay=st.none() | st.integers(64 << 20, 2 * GIB),
    ahead=st.none() | st.integers(0, 2 * GIB),
)
def test_the_limit_that_is_named_is_enough_and_hardly_more(
    recipe: Recipe, rows: int, count: int, overlay: int | None, ahead: int | None
) -> None:
    """The refusal tells what would fit; one who believes it is not refused again."""
    specs = tables(recipe, rows, count)
    settings = {"overlay_bytes": overlay, "lookahead_bytes": ahead}
    least = least_limit(specs, **settings)

    assert plan_memory(specs, least, **settings).fits
    assert not plan_memory(specs, least * 16 // 17 - (2 << 20), **settings).fits


def test_a_refusal_names_every_part_and_what_would_do(recipe: Recipe) -> None:
    """With the settings that were given, and without them."""
    specs = tables(recipe, 1 << 22)
    settings = {"overlay_bytes": 256 << 20, "lookahead_bytes": 64 << 20}

    with pytest.raises(ConfigError) as refused:
        check_plan(plan_memory(specs, 300 << 20, **settings), specs, **settings)

    message = str(refused.value)
    assert "with overlay_bytes=268,435,456 and lookahead_bytes=67,108,864" in message
    assert f"{4 << 22:,} for where rows are" in message
    named = re.search(r"give it ([\d,]+), or leave out .*: then ([\d,]+) are enough", message)
    assert named is not None
    enough, without = (int(number.replace(",", "")) for number in named.groups())
    check_plan(plan_memory(specs, enough, **settings), specs, **settings)
    check_plan(plan_memory(specs, without), specs, overlay_bytes=None, lookahead_bytes=None)
    assert without < 300 << 20 < enough


def test_what_is_there_bounds_what_is_asked_for(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A setting beyond the limit of the cgroup is said to be, and the limit counts."""
    monkeypatch.setattr(memory_plan, "memory_limit_bytes", lambda: 3 * GIB)
    monkeypatch.setattr(memory_plan, "process_bytes", lambda: GIB)
    specs = tables(recipe, 1 << 20)

    assert store_plan(specs, None, None, None).limit_bytes == 2 * GIB
    assert store_plan(specs, GIB, None, None).limit_bytes == GIB
    assert not caplog.records
    assert store_plan(specs, 3 * GIB, None, None).limit_bytes == 2 * GIB
    assert "memory_bytes is 3221225472, and" in caplog.text


def test_little_memory_that_nobody_chose_is_only_said(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The process may be smaller later; a store that opened before still does."""
    monkeypatch.setattr(memory_plan, "memory_limit_bytes", lambda: 50 << 20)
    monkeypatch.setattr(memory_plan, "process_bytes", lambda: 40 << 20)

    plan = store_plan(tables(recipe, 1 << 22), None, None, None)

    assert plan.page_cache_bytes == 0
    assert plan.capacity == 4096
    assert "there is little memory for this store" in caplog.text


def test_the_limit_is_what_the_machine_leaves_this_process(recipe: Recipe) -> None:
    """Without a setting. What the process has grown to since is not much."""
    before = memory_limit_bytes() - process_bytes()
    limit = store_plan(tables(recipe, 1000), None, None, None).limit_bytes
    assert abs(limit - before) < 64 << 20


def test_a_store_keeps_to_the_setting(make_pair: MakePair, recipe: Recipe) -> None:
    """Opened with the least that the refusal names, it trains."""
    least = least_limit(list(specs_of(recipe).values()))
    pair = make_pair(options={"memory_bytes": least})
    engine = pair.store._engine
    assert isinstance(engine, Engine)

    assert engine.memory_plan.limit_bytes == least
    assert engine.capacity == engine.memory_plan.capacity
    pair.train(3)
    pair.check()


@pytest.mark.parametrize("wrong", [-1, 1.5, True, "1GiB"])
def test_a_setting_that_is_no_number_of_bytes_is_refused(
    make_store: MakeStore, wrong: object
) -> None:
    """Before anything is opened."""
    with pytest.raises(ConfigError, match=r"memory_bytes is .*; it is a whole number"):
        engram_store.open(make_store(), "train", memory_bytes=wrong)  # type: ignore[arg-type]


def test_too_little_is_refused_and_leaves_the_store_alone(make_store: MakeStore) -> None:
    """It can be opened with more at once: the lock is free."""
    path = make_store()
    with pytest.raises(ConfigError, match="memory_bytes is too small") as refused:
        engram_store.open(path, "train", memory_bytes=1 << 20)
    named = re.search(r"give it ([\d,]+)", str(refused.value))
    assert named is not None
    engram_store.open(path, "train", memory_bytes=int(named[1].replace(",", ""))).close()
