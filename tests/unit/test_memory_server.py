"""The memory of a store process, shared by its stores."""

from pathlib import Path

import pytest

from engram_store.engine.engine import Engine
from engram_store.engine.memory_plan import least_limit
from engram_store.errors import ConfigError
from engram_store.layout.paths import StorePaths
from engram_store.recipes import Recipe
from engram_store_server.config import ServerConfig, load_config
from engram_store_server.home import open_store
from tests.pairs import MakeStore, specs_of


@pytest.mark.parametrize("sharers", [1, 3])
def test_stores_share_what_the_process_may_use(
    make_store: MakeStore, recipe: Recipe, sharers: int
) -> None:
    """Each plans with its part, shared memory and windows ahead too."""
    path, whole = make_store(), 3 * least_limit(list(specs_of(recipe).values()))
    config = ServerConfig(data_dir=path, memory_bytes=whole)

    with open_store(StorePaths(path), config, sharers=sharers) as store:
        engine = store._engine
        assert isinstance(engine, Engine)
        plan = engine.memory_plan

    assert plan.limit_bytes == whole // sharers
    assert plan.overlay_bytes + plan.staging_bytes < plan.limit_bytes // 2


def test_a_process_with_too_little_names_the_store(make_store: MakeStore) -> None:
    """As any setting that a store refuses."""
    path = make_store()
    config = ServerConfig(data_dir=path, memory_bytes=2 << 20)
    with pytest.raises(ConfigError, match=r"a\.engram: memory_bytes is too small"):
        open_store(StorePaths(path), config, sharers=2)


def test_it_is_set_like_everything_else(tmp_path: Path) -> None:
    """File, environment and command line, in that order."""
    directory = {"data_dir": str(tmp_path)}
    assert load_config({"memory_bytes": 5}, {}, directory)[0].memory_bytes == 5
    env = {"ENGRAM_STORE_MEMORY_BYTES": "6"}
    assert load_config({"memory_bytes": 5}, env, directory)[0].memory_bytes == 6
    assert load_config({}, env, {**directory, "memory_bytes": 7})[0].memory_bytes == 7
    with pytest.raises(ConfigError, match="memory_bytes"):
        load_config({}, {}, {**directory, "memory_bytes": 0})
