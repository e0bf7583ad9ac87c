"""Making a store over the wire: what may be asked for, and that nothing is left half made."""

import json
import multiprocessing
import os
import shutil
import signal
from collections import namedtuple
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import engram_store
from engram_store import wire
from engram_store.errors import (
    ConfigError,
    DiskFullError,
    ProtocolError,
    RecipeError,
    StoreClosedError,
    StoreExistsError,
)
from engram_store.layout.metadata import read_metadata
from engram_store.layout.paths import StorePaths
from engram_store.recipes import Recipe
from engram_store.store import Store
from engram_store_server.config import ServerConfig
from engram_store_server.creation import Creation, StoreMaker, decode_creation
from engram_store_server.home import find_stores
from tests.pairs import INITIAL, specs_of
from tests.unit.server.creations import request_of

Usage = namedtuple("Usage", ["total", "used", "free"])


def go_on() -> None:
    """Nobody wants the creation to end."""


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """An empty directory of stores."""
    path = tmp_path / "home"
    path.mkdir()
    return path


@pytest.fixture
def make(home: Path, recipe: Recipe) -> Iterator[Callable[..., Store]]:
    """Makes stores in it; they are closed afterwards."""
    made: list[Store] = []
    found = find_stores(home)

    def make(
        name: str = "new",
        *,
        settings: dict[str, Any] | None = None,
        go_on: Callable[[], None] = go_on,
        **options: Any,
    ) -> Store:
        maker = StoreMaker(found, ServerConfig(data_dir=home, **(settings or {})))
        creation = decode_creation(request_of(recipe, name, **options))
        made.append(maker.make(creation, sharers=1, go_on=go_on))
        return made[-1]

    yield make
    for store in made:
        store.close()


def left_in(home: Path) -> list[str]:
    """Everything but the empty directory in which stores are made."""
    names = (path.relative_to(home).as_posix() for path in home.rglob("*"))
    return sorted(name for name in names if name != ".creating")


# ---------------------------------------------------------------------- what is asked for


def test_a_creation_without_options_is_that_of_create(recipe: Recipe) -> None:
    """The same defaults."""
    creation = decode_creation(request_of(recipe))

    assert (creation.name, creation.recipe, creation.initial) == ("new", recipe, None)
    assert {spec.layer: spec for spec in creation.tables} == specs_of(recipe)


def test_every_option_arrives(recipe: Recipe) -> None:
    """Those of single layers too."""
    creation = decode_creation(
        request_of(
            recipe,
            dim=8,
            dtype="float32",
            optimizer="adam",
            initial={"std": 0.5, "seed": 3},
            stochastic_rounding=False,
            on_nonfinite="skip",
            seed=7,
            per_layer={"2": {"dim": 4, "dtype": "float16", "optimizer": "sgd"}},
        )
    )

    first, second = creation.tables
    settings = {"dtype": "float32", "optimizer": "adam", "on_nonfinite": "skip", "seed": 7}
    assert first == specs_of(recipe, dim=8, stochastic_rounding=False, **settings)[1]
    assert (second.dim, second.dtype, second.optimizer, second.seed) == (4, "float16", "sgd", 7)
    assert creation.initial == engram_store.Normal(std=0.5, seed=3)
    assert creation.full_bytes == first.rows * 8 * (4 + 8) + second.rows * 4 * 2


@pytest.mark.parametrize(
    "name",
    [
        *("", ".", "..", ".a", "-a", "a/b", "/etc", "a\\b", "a b", "a\n", "a\0b", "é", "x" * 101),
        *("run", "LOCK", "lost+found"),
    ],
)
def test_names_that_are_no_plain_file_names_are_refused(recipe: Recipe, name: str) -> None:
    """And those that the directory uses itself; the message says what is allowed."""
    with pytest.raises(ConfigError, match="1 to 100 letters, digits"):
        decode_creation(request_of(recipe, name))


@pytest.mark.parametrize("name", ["a", "9", "my.engram", "A-b_c.1", "x" * 100])
def test_plain_names_are_taken(recipe: Recipe, name: str) -> None:
    """As people name their models."""
    assert decode_creation(request_of(recipe, name)).name == name


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"dimm": 4}, "unknown key 'dimm'.*dim, dtype"),
        ({"layer": 1}, "unknown key 'layer'"),
        ({"dim": 0}, "dim"),
        ({"dim": 1 << 60}, "dim"),
        ({"dim": True}, "dim"),
        ({"dim": None}, "dim"),
        ({"dtype": "int8"}, "allowed are bfloat16, float16, float32"),
        ({"dtype": ["float32"]}, "allowed are bfloat16"),
        ({"optimizer": "lion"}, "allowed are sgd"),
        ({"on_nonfinite": 3}, "allowed are reject"),
        ({"stochastic_rounding": "yes"}, "neither true nor false"),
        ({"seed": 1.5}, "seed"),
        ({"seed": -1}, "seed"),
        ({"initial": "normal"}, "initial"),
        ({"initial": {"std": 0}}, "std"),
        ({"initial": {"std": "1"}}, "null for zeros"),
        ({"initial": {"std": 1, "mean": 2}}, "null for zeros"),
        ({"initial": {"std": 10**400}}, "initial"),
        ({"initial": {"std": 1, "seed": -1}}, "seed"),
        ({"per_layer": []}, "per_layer must be an object"),
        ({"per_layer": {"3": {}}}, "the recipe has layers 1, 2"),
        ({"per_layer": {"1": 4}}, "per_layer of layer 1 must be an object"),
        ({"per_layer": {"1": {"rows": 4}}}, "per_layer of layer 1 has an unknown key 'rows'"),
    ],
)
def test_options_that_make_no_sense_are_refused(
    recipe: Recipe, options: dict[str, Any], part: str
) -> None:
    """With what is allowed."""
    with pytest.raises(ConfigError, match=part):
        decode_creation(request_of(recipe, **options))


@pytest.mark.parametrize("text", ["", "[]", "{", "[" * 100_000, '{"family": "engram"}'])
def test_texts_that_are_no_recipe_or_options_are_refused(recipe: Recipe, text: str) -> None:
    """Whatever they are."""
    for field in ("recipe_json", "options_json"):
        request = request_of(recipe)
        setattr(request, field, text)
        with pytest.raises(ConfigError):
            decode_creation(request)


def test_the_number_of_tables_is_limited(recipe: Recipe) -> None:
    """Each takes a thread."""
    for count in (1024, 1025):
        request, asked = request_of(recipe), recipe.to_json()
        asked["layers"] = [asked["layers"][0] | {"layer": number} for number in range(count)]
        request.recipe_json = json.dumps(asked)
        if count == 1024:
            assert len(decode_creation(request).tables) == count
            continue
        with pytest.raises(RecipeError, match="at most 1,024"):
            decode_creation(request)


def test_a_request_needs_a_dim(recipe: Recipe) -> None:
    """Nothing else has no default."""
    request = request_of(recipe)
    request.options_json = "{}"
    with pytest.raises(ConfigError, match="no dim"):
        decode_creation(request)


def test_the_token_map_must_be_the_recipe_s(recipe: Recipe) -> None:
    """In dtype, shape and content; an array that lies is a protocol error."""
    for array in (np.arange(500, dtype=np.int64), np.zeros((5, 100), np.int32),
                  np.zeros(500, np.int32)):  # fmt: skip
        request = request_of(recipe)
        request.token_map.CopyFrom(wire.encode_array(array))
        with pytest.raises(RecipeError, match="token map"):
            decode_creation(request)
    request = request_of(recipe)
    request.ClearField("token_map")
    with pytest.raises(RecipeError):
        decode_creation(request)
    request = request_of(recipe)
    request.token_map.shape[0] = 7
    with pytest.raises(ProtocolError):
        decode_creation(request)


# ---------------------------------------------------------------------- making


def test_a_made_store_is_open_and_found_again(make: Callable[..., Store], home: Path) -> None:
    """Its rows are those that `create` writes."""
    store = make(initial={"std": 0.02})

    ids = np.arange(1000, dtype=np.int32)
    expected = INITIAL.rows(1, 0, 1000, store.tables[1])
    assert store.read_rows(1, ids).tobytes() == expected.tobytes()
    assert list(find_stores(home).paths) == ["new"]


def test_a_name_that_is_taken_is_refused(make: Callable[..., Store], home: Path) -> None:
    """By a store, by anything else, and by a store that is just being made."""
    make("a")
    (home / "file").touch()
    (home / "link").symlink_to(home / "nowhere")

    for name in ("a", "file", "link"):
        with pytest.raises(StoreExistsError, match="choose another name"):
            make(name)

    refused: list[str] = []

    def meanwhile() -> None:
        if not refused:
            refused.append("once")
            with pytest.raises(StoreExistsError, match="being made already"):
                maker.make(creation, sharers=1, go_on=go_on)

    maker = StoreMaker(find_stores(home), ServerConfig(data_dir=home))
    recipe = read_metadata(StorePaths(home / "a")).recipe
    creation = decode_creation(request_of(recipe, "b", initial={"std": 1}))
    maker.make(creation, sharers=1, go_on=meanwhile).close()
    assert refused


def test_a_store_larger_than_the_disk_is_refused_before_anything_is_written(
    make: Callable[..., Store], home: Path, recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One byte too large: the message has both sizes."""
    needed = decode_creation(request_of(recipe)).full_bytes
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(10**12, 0, needed - 1))

    with pytest.raises(DiskFullError, match=f"{needed:,} bytes.*{needed - 1:,} free"):
        make()

    assert list(home.iterdir()) == []


def test_a_creation_that_fails_leaves_nothing(make: Callable[..., Store], home: Path) -> None:
    """Given up on the way, or made and then not to be opened; afterwards the name is free."""

    def give_up() -> None:
        raise StoreClosedError("the process stops")

    with pytest.raises(StoreClosedError):
        make(initial={"std": 0.02}, go_on=give_up)
    assert left_in(home) == []

    with pytest.raises(ConfigError, match="new: overlay_bytes is 5"):
        make(settings={"overlay_bytes": 5})
    assert left_in(home) == []

    make()


def killed_on_the_way(home: Path, creation: Creation) -> None:
    """In a process of its own."""
    maker = StoreMaker(find_stores(home), ServerConfig(data_dir=home))
    maker.make(creation, sharers=1, go_on=lambda: os.kill(os.getpid(), signal.SIGKILL))


def test_a_killed_creation_leaves_nothing_that_is_served(home: Path, recipe: Recipe) -> None:
    """The next process that claims the directory removes what is there."""
    creation = decode_creation(request_of(recipe, initial={"std": 0.02}))
    context = multiprocessing.get_context("spawn")
    process = context.Process(target=killed_on_the_way, args=(home, creation))
    process.start()
    process.join()

    assert process.exitcode == -signal.SIGKILL
    assert left_in(home)
    found = find_stores(home)
    assert not found.paths
    with found.claim():
        assert list(home.iterdir()) == [home / "LOCK"]
