"""What a process serves: finding, opening, making and closing stores."""

from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import engram_store
from engram_store.engine.placement import overlay_capacity
from engram_store.errors import (
    CapacityError,
    ConfigError,
    EngramStoreError,
    ForeignFileError,
    ProtocolError,
    StoreClosedError,
    StoreFileError,
    StoreLockedError,
    StoreNotFoundError,
    UnknownStoreError,
)
from engram_store.lookahead import default_room
from engram_store.recipes import Recipe
from engram_store.store import Store
from engram_store_server.config import ServerConfig
from engram_store_server.creation import StoreMaker
from engram_store_server.home import close_stores, find_stores, open_stores, overlay_share
from engram_store_server.limits import SessionLimits
from engram_store_server.stores import Stores
from tests.pairs import MakePair, MakeStore, memtable_directory, specs_of
from tests.unit.server.creations import request_of

Usage = namedtuple("Usage", ["total", "used", "free"])


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """An empty directory of stores."""
    path = tmp_path / "home"
    path.mkdir()
    return path


# ---------------------------------------------------------------------- finding


def test_a_store_is_served_under_its_directory_s_name(
    make_store: MakeStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the process runs in it."""
    path = make_store()
    monkeypatch.chdir(path)

    for root in (path, Path()):
        found = find_stores(root)
        assert (found.several, list(found.paths)) == (False, ["a.engram"])


def test_every_store_of_a_directory_is_found_and_nothing_else(
    make_store: MakeStore, tmp_path: Path
) -> None:
    """In the order of names; hidden directories, files and Zarr groups of others are left out."""
    for name in ("home/b", "home/a", "home/.hidden"):
        make_store(name)
    home = tmp_path / "home"
    (home / "foreign").mkdir()
    (home / "foreign" / "zarr.json").write_text('{"attributes": {}, "zarr_format": 3}')
    (home / "notes.txt").write_text("a.engram is the good one")
    (home / "linked").symlink_to(home / "a.engram")

    found = find_stores(home)

    assert found.several
    assert list(found.paths) == ["a.engram", "b.engram", "linked"]


@pytest.mark.parametrize("missing", ["zarr.json", "CURRENT.json"])
def test_a_damaged_store_is_not_left_out(
    make_store: MakeStore, tmp_path: Path, missing: str
) -> None:
    """It is an error that names it, and no store stays open."""
    make_store("home/a")
    damaged = make_store("home/b")
    (damaged / missing).unlink()
    home = tmp_path / "home"

    with pytest.raises(StoreFileError, match=r"b\.engram"):
        open_stores(find_stores(home), ServerConfig(data_dir=home))

    engram_store.open(home / "a.engram", "train").close()


def test_an_empty_directory_may_be_served(home: Path) -> None:
    """With what an earlier process and a new file system leave in it."""
    for name in ("run", "lost+found", ".creating"):
        (home / name).mkdir()
    (home / "LOCK").touch()

    found = find_stores(home)

    assert found.several
    assert not found.paths


def test_a_directory_of_other_things_is_refused(tmp_path: Path) -> None:
    """As are a file, and a directory that is not there."""
    (tmp_path / "photos").mkdir()
    (tmp_path / "file").touch()

    with pytest.raises(StoreNotFoundError, match=r"other things \((file|photos)\)"):
        find_stores(tmp_path)
    for name in ("file", "absent"):
        with pytest.raises(StoreNotFoundError, match="no store here"):
            find_stores(tmp_path / name)


def test_a_directory_that_cannot_be_looked_at_is_an_error(
    make_store: MakeStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may be a store, which nobody would miss until it is trained; a new disk's own is not."""
    make_store("home/a")
    home = tmp_path / "home"
    (home / "lost+found").mkdir()
    read_bytes = Path.read_bytes

    def refuse(path: Path) -> bytes:
        if path.parent.name in ("lost+found", "private"):
            raise PermissionError(13, "Permission denied")
        return read_bytes(path)

    monkeypatch.setattr(Path, "read_bytes", refuse)
    assert list(find_stores(home).paths) == ["a.engram"]
    (home / "private").mkdir()
    with pytest.raises(StoreFileError, match=r"private: cannot be looked at \(Permission denied\)"):
        find_stores(home)


def test_one_process_at_a_time_serves_a_directory(home: Path) -> None:
    """Also an empty one: both would make stores there."""
    found = find_stores(home)
    with found.claim(), pytest.raises(StoreLockedError), found.claim():
        pass
    with found.claim():
        pass


def test_a_store_that_is_trained_elsewhere_is_named_early(
    make_pair: MakePair, make_store: MakeStore, tmp_path: Path
) -> None:
    """Before anything is opened, and the directory can be claimed later."""
    make_store("home/a")
    pair = make_pair("home/b")
    found = find_stores(tmp_path / "home")

    with pytest.raises(StoreLockedError, match=r"b\.engram"), found.claim():
        pass

    pair.store.close()
    with found.claim():
        pass


# ---------------------------------------------------------------------- memory


def test_the_default_of_overlay_bytes_is_divided(recipe: Recipe) -> None:
    """Among the stores; none gets less than it needs."""
    tables = specs_of(recipe)
    specs = list(tables.values())
    alone = overlay_capacity(specs, None)

    half = overlay_capacity(specs, overlay_share(tables, 2))
    assert 0 < alone - 2 * half < 2 * 4096
    assert overlay_capacity(specs, overlay_share(tables, 1)) == alone
    assert overlay_capacity(specs, overlay_share(tables, 1_000_000)) == 4096


def test_stores_share_memory_only_where_nothing_else_was_asked_for(
    make_store: MakeStore, tmp_path: Path, recipe: Recipe
) -> None:
    """Given explicitly, `overlay_bytes` is what each store gets."""
    for name in ("home/a", "home/b"):
        make_store(name)
    found = find_stores(tmp_path / "home")
    asked = overlay_share(specs_of(recipe), 4)

    def slots(**settings: Any) -> list[int]:
        opened = open_stores(found, ServerConfig(data_dir=found.root, **settings))
        engines: list[Any] = [store._engine for store in opened.values()]
        counts = [engine._memtables[0].capacity for engine in engines]
        close_stores(opened)
        return counts

    specs = list(specs_of(recipe).values())
    assert slots(overlay_bytes=asked) == 2 * [overlay_capacity(specs, asked)]
    assert slots() == 2 * [overlay_capacity(specs, overlay_share(specs_of(recipe), 2))]


def test_stores_share_the_memory_for_looking_ahead(
    make_store: MakeStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its default is divided; given explicitly it is what each store gets, as `staleness` is."""
    for name in ("home/a", "home/b"):
        make_store(name)
    found, given, really = find_stores(tmp_path / "home"), list[Any](), engram_store.open

    def recorded(*args: Any, **options: Any) -> Store:
        given.append((options["lookahead_bytes"], options["staleness"]))
        return really(*args, **options)

    monkeypatch.setattr(engram_store, "open", recorded)
    for config in (
        ServerConfig(data_dir=found.root),
        ServerConfig(data_dir=found.root, lookahead_bytes=5_000, staleness=2),
    ):
        close_stores(open_stores(found, config))

    assert given == [*2 * [(default_room() // 2, 0)], *2 * [(5_000, 2)]]


def test_an_error_of_opening_names_the_store(make_store: MakeStore, tmp_path: Path) -> None:
    """Where its own message does not."""
    make_store("home/a")
    found = find_stores(tmp_path / "home")

    with pytest.raises(ConfigError, match=r"a\.engram: overlay_bytes is 5"):
        open_stores(found, ServerConfig(data_dir=found.root, overlay_bytes=5))


# ---------------------------------------------------------------------- serving


@pytest.fixture
def served(make_store: MakeStore, home: Path) -> Iterator[Stores]:
    """Two stores, and a maker of more."""
    paths = [make_store(f"home/{name}") for name in "ab"]
    found, config = find_stores(home), ServerConfig(data_dir=home)
    stores = Stores(open_stores(found, config), SessionLimits(), StoreMaker(found, config))
    yield stores
    stores.close()
    assert all(not memtables_of(path).exists() for path in paths)


def memtables_of(path: Path) -> Path:
    return memtable_directory(path, engram_store.inspect(path).metadata.store_id)


def test_stores_are_found_by_name(served: Stores) -> None:
    """No name is enough where there is one; otherwise the message lists them."""
    assert served.find("b.engram").name == "b.engram"
    assert [entry.name for entry in served.all()] == ["a.engram", "b.engram"]
    for name, part in (("c", "no store 'c'"), ("", "several stores")):
        with pytest.raises(UnknownStoreError, match=f"{part}.*a.engram, b.engram"):
            served.find(name)


def test_a_created_store_is_served_at_once(served: Stores, recipe: Recipe) -> None:
    """With a share of the memory that is smaller than that of two."""
    created = served.create(request_of(recipe, "c"))

    assert served.find("c") is created
    assert [entry.name for entry in served.all()] == ["a.engram", "b.engram", "c"]
    engine: Any = created.store._engine
    share = overlay_share(created.store.tables, 3)
    expected = overlay_capacity(list(created.store.tables.values()), share)
    assert engine._memtables[0].capacity == expected


def test_a_process_of_one_store_makes_no_others(make_pair: MakePair, recipe: Recipe) -> None:
    """The message says how to."""
    stores = Stores({"a": make_pair().store}, SessionLimits())

    with pytest.raises(ProtocolError, match=r"serves one store, a,.*directory of stores"):
        stores.create(request_of(recipe))


def test_nothing_is_created_once_the_process_ends(
    served: Stores, recipe: Recipe, home: Path
) -> None:
    """Initial rows are given up; what is complete is closed and kept for the next start."""
    served.end_sessions()

    with pytest.raises(StoreClosedError, match="given up"):
        served.create(request_of(recipe, "c", initial={"std": 0.02}))
    assert not (home / "c").exists()
    with pytest.raises(StoreClosedError, match="was made, but"):
        served.create(request_of(recipe, "d"))

    assert [entry.name for entry in served.all()] == ["a.engram", "b.engram"]
    engram_store.open(home / "d", "train").close()


class _Broken:
    """A store that cannot be closed."""

    def __init__(self, error: Exception) -> None:
        self._error = error

    def close(self) -> None:
        raise self._error


def test_every_store_is_closed_also_when_one_cannot_be(make_pair: MakePair) -> None:
    """The first error is raised, after the others were closed."""
    first, second = make_pair("a").store, make_pair("b").store
    broken: Any = _Broken(CapacityError(28, "the disk is full"))
    worse: Any = _Broken(RuntimeError("odd"))

    with pytest.raises(CapacityError, match="the disk is full"):
        close_stores({"0": broken, "a": first, "b": worse, "c": second})

    for store in (first, second):
        with pytest.raises(StoreClosedError):
            store.stats()


def test_errors_of_other_kinds_keep_their_class(make_store: MakeStore, tmp_path: Path) -> None:
    """Who opens a directory of stores can tell what is wrong with one."""
    path = make_store("home/a")
    (path / "zarr.json").write_text("{")
    found = find_stores(tmp_path / "home")

    with pytest.raises(ForeignFileError) as caught:
        open_stores(found, ServerConfig(data_dir=found.root))

    assert isinstance(caught.value, EngramStoreError)
    assert str(path) in str(caught.value)
