"""`engram_store.create`: what it takes, and what it makes of it."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import engram_store
from engram_store.errors import ConfigError
from engram_store.recipes import Recipe, engram
from engram_store.types import NonFinitePolicy, OptimizerKind, RowDtype, TableSpec


def test_options_of_a_single_layer_are_given_as_those_of_all(
    tmp_path: Path, recipe: Recipe
) -> None:
    """Words and numpy's numbers; what is stored is plain."""
    path = tmp_path / "a.engram"
    other = {
        "dim": np.int64(8),
        "dtype": "float32",
        "optimizer": "adam",
        "on_nonfinite": "skip",
        "stochastic_rounding": False,
        "seed": np.int32(5),
    }

    engram_store.create(path, recipe, dim=4, per_layer={2: other})

    tables = engram_store.inspect(path).metadata.tables
    assert tables[1].dim == 4
    assert tables[2].to_json() == {
        **other,
        "layer": 2,
        "rows": tables[2].rows,
        "chunk_rows": tables[2].chunk_rows,
    }
    assert type(tables[2].dim) is int
    assert tables[2].dtype is RowDtype.FLOAT32
    assert tables[2].optimizer is OptimizerKind.ADAM
    assert tables[2].on_nonfinite is NonFinitePolicy.SKIP


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"per_layer": {2: {"dtype": "int4"}}}, "dtype is 'int4'"),
        ({"per_layer": {2: {"rows": 5}}}, "no option 'rows'; it has ['dim'"),
        ({"per_layer": {7: {"dim": 5}}}, "layer 7; the recipe's layers are [1, 2]"),
        ({"per_layer": {"2": {"dim": 5}}}, "layer '2'; the recipe's layers are [1, 2]"),
        ({"dim": 4.0}, "dim is 4.0"),
        ({"seed": "x"}, "seed is 'x'"),
        ({"stochastic_rounding": "no"}, "stochastic_rounding is 'no': must be True or False"),
        ({"optimizer": "lion"}, "optimizers ['sgd'"),
    ],
)
def test_options_that_make_no_sense_are_refused_by_name(
    tmp_path: Path, recipe: Recipe, options: dict[str, Any], part: str
) -> None:
    """Nothing is made, and no option is left out silently."""
    with pytest.raises(ConfigError) as caught:
        engram_store.create(tmp_path / "a.engram", recipe, **{"dim": 4, **options})
    assert part in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_a_tokenizer_whose_tokens_all_read_alike_makes_a_store(tmp_path: Path) -> None:
    """Zarr writes no chunk of zeros by itself, and a store without its token map is damaged."""
    recipe = engram(
        token_map=np.zeros(30, np.int32), layers=[1], rows_per_head=11, heads=2, pad_id=0
    )
    path = tmp_path / "a.engram"
    engram_store.create(path, recipe, dim=4)
    with engram_store.open(path, "train") as store:
        assert store.recipe == recipe
        window = store.announce(np.array([[5, 6, 7]]), 0)
        window.push(1, np.ones((window.row_ids(1).size, 4), np.float32))
        store.commit(0, 0.1)
        assert store.step == 1


TABLE = TableSpec(layer=1, rows=100, dim=4).to_json()


@pytest.mark.parametrize(
    "change",
    [
        {"dim": 4.0},
        {"rows": True},
        {"layer": "1"},
        {"seed": 0.5},
        {"seed": None},
        {"chunk_rows": 1024.0},
        {"chunk_rows": True},
        {"stochastic_rounding": 1},
        {"stochastic_rounding": None},
        {"dtype": []},
        {"optimizer": 3},
        {"extra": 1},
    ],
)
def test_a_table_description_of_other_types_is_refused(change: dict[str, Any]) -> None:
    """Python would take 4.0 and true for numbers, until a length of a file is made of them."""
    assert TableSpec.from_json(TABLE).to_json() == TABLE
    with pytest.raises(ConfigError, match="not a table description"):
        TableSpec.from_json({**TABLE, **change})


@pytest.mark.parametrize("described", [None, [], "rows", 5, {}])
def test_what_is_no_table_description_is_refused(described: Any) -> None:
    with pytest.raises(ConfigError, match="not a table description"):
        TableSpec.from_json(described)
