"""Experiments of docs/results.md: one tiny run of each kind, and the records of runs."""

import argparse
import inspect
import math
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from benchmarks.shape.errors import ShapeError
from benchmarks.shape.plan import (
    UNTOUCHED,
)
from benchmarks.shape.records import Records, append_record, read_records
from benchmarks.shape.runner import run_missing
from benchmarks.shape.training import spread
from benchmarks.shape.variants import Base, Hash, Rows, Run, Variant
from benchmarks.shape.workshop import SETTINGS, Workshop, open_workshop
from engram_store_client.demo.corpus import Domain, split_docstrings

TINY = replace(
    SETTINGS,
    code_chars=60_000,
    prose_chars=60_000,
    vocabulary=300,
    hidden=32,
    blocks=4,
    time=32,
    batch=2,
    base_steps=3,
    eval_sequences=8,
)
SMALL = Variant(rows_per_head=300, heads=2, dim=12, steps=8)
KINDS = {
    "base": UNTOUCHED,
    "control": SMALL.control(),
    "engram": SMALL,
    "two layers": replace(SMALL, layers=(0, 3)),
    "engram-peft": replace(SMALL, hash=Hash.ENGRAM_PEFT),
    "orders": replace(SMALL, orders=(2, 3, 4), heads=1),
    "lora": replace(SMALL, rows=Rows.ABSENT, base=Base.LORA, base_lr=5e-3),
    "lora + control": replace(SMALL.control(), base=Base.LORA, base_lr=5e-3),
    "lora + engram": replace(SMALL, base=Base.LORA, base_lr=5e-3),
    "full": replace(SMALL, rows=Rows.ABSENT, base=Base.FULL, base_lr=1e-3),
    "full + engram": replace(SMALL, base=Base.FULL, base_lr=1e-3),
}


def quiet(_: str) -> None:
    pass


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    """A base on a few modules of the standard library: reading all of it takes seconds."""
    texts = [split_docstrings(inspect.getsource(module)) for module in (argparse, inspect)]
    code, prose = (Domain(train=(a,), held_out=(b,)) for a, b in zip(*texts, strict=True))
    with patch("benchmarks.shape.workshop.collect", lambda _code, _prose: (code, prose)):
        return open_workshop(tmp_path_factory.mktemp("workshop"), TINY, quiet)


@pytest.fixture(scope="module")
def records_file(workshop: Workshop) -> Path:
    """One run of each kind."""
    pytest.importorskip("peft")
    path = workshop.files.root / "records.jsonl"
    runs = [Run(variant, 0) for variant in KINDS.values()]
    assert run_missing(workshop, runs, path, say=quiet) == len(runs)
    return path


@pytest.fixture(scope="module")
def records(records_file: Path) -> Records:
    return read_records(records_file)


def record_of(records: Records, kind: str) -> dict[str, Any]:
    record = records.get(KINDS[kind], 0)
    assert record is not None
    return record


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_of_every_kind_leaves_a_whole_record(kind: str, records: Records) -> None:
    """Configuration, machine, both perplexities."""
    record = record_of(records, kind)
    steps = 0 if kind == "base" else SMALL.steps

    assert Variant.from_json(record["variant"]) == KINDS[kind]
    assert record["steps"] == steps
    assert all(1 < record["perplexity"][domain] < math.inf for domain in ("prose", "code"))
    assert record["machine"]["versions"]["torch"]


@pytest.mark.parametrize("kind", ["engram", "two layers", "engram-peft", "orders", "full + engram"])
def test_tables_are_trained_where_they_should_be(kind: str, records: Records) -> None:
    """Rows of the store differ from those that it was created with."""
    table = record_of(records, kind)["table"]

    assert 0 < table["changed_rows"] <= table["rows"]
    planned = KINDS[kind].table_bytes
    assert planned <= table["row_bytes"] < 1.2 * planned  # each head is rounded up to a prime


@pytest.mark.parametrize("kind", ["control", "lora + control"])
def test_the_control_learns_and_leaves_its_table_alone(kind: str, records: Records) -> None:
    """It is the gates that learn."""
    record = record_of(records, kind)

    assert record["table"]["changed_rows"] == 0
    assert record["perplexity"]["prose"] < record_of(records, "base")["perplexity"]["prose"]
    assert record["parameters"]["gates"] > 0


def test_what_learns_is_what_the_variant_says(records: Records) -> None:
    """Gates, LoRA's weights, all weights of the base: in every combination."""
    learning = {kind: record_of(records, kind)["parameters"] for kind in KINDS}
    gates, lora = learning["engram"]["gates"], learning["lora"]["base"]
    full = record_of(records, "base")["base"]["parameters"]

    assert learning["base"] == {"gates": 0, "base": 0}
    assert learning["engram"] == learning["control"] == {"gates": gates, "base": 0}
    assert learning["lora + engram"] == {"gates": gates, "base": lora}
    assert learning["full"] == {"gates": 0, "base": full}
    assert learning["full + engram"] == {"gates": gates, "base": full}
    assert 0 < lora < full


def test_a_run_that_is_recorded_is_not_done_again(workshop: Workshop, records_file: Path) -> None:
    """So the plan can be interrupted and called again."""
    before = records_file.read_bytes()

    done = run_missing(workshop, [Run(KINDS["engram"], 0)], records_file, say=quiet)

    assert done == 0
    assert records_file.read_bytes() == before


def test_the_same_run_gives_the_same_perplexity(
    workshop: Workshop, records: Records, tmp_path: Path
) -> None:
    """To the last digit; another seed does not."""
    runs = [Run(KINDS["lora + engram"], seed) for seed in (0, 1)]
    run_missing(workshop, runs, tmp_path / "again.jsonl", say=quiet)

    same, other = read_records(tmp_path / "again.jsonl").by_run.values()

    assert same["perplexity"] == record_of(records, "lora + engram")["perplexity"]
    assert other["perplexity"] != same["perplexity"]


def test_no_time_begins_no_run(workshop: Workshop, tmp_path: Path) -> None:
    """A limit in seconds ends between two runs."""
    runs = [Run(replace(SMALL, lr=1e-4), 0)]

    assert run_missing(workshop, runs, tmp_path / "none.jsonl", seconds=-1.0, say=quiet) == 0
    assert not (tmp_path / "none.jsonl").exists()


def test_a_base_of_other_settings_is_refused(workshop: Workshop) -> None:
    """A directory's base is never taken for another one."""
    with pytest.raises(ShapeError, match="base_steps differ"):
        open_workshop(workshop.files.root, replace(TINY, base_steps=4), quiet)


def test_evaluation_is_from_all_over_the_held_out_files(workshop: Workshop) -> None:
    """First and last sequence included."""
    chosen = spread(workshop.held_out_prose, TINY)

    assert len(chosen) == TINY.eval_sequences
    assert (chosen[0] == workshop.held_out_prose[0]).all()
    assert (chosen[-1] == workshop.held_out_prose[-1]).all()


def test_records_of_two_bases_are_refused(records: Records, tmp_path: Path) -> None:
    """Their perplexities cannot be compared."""
    path = tmp_path / "mixed.jsonl"
    record = record_of(records, "base")
    append_record(path, record)
    append_record(path, {**record, "base": {**record["base"], "fingerprint": "other"}})

    with pytest.raises(ShapeError, match="line 2 was run on the base other"):
        read_records(path)


def test_no_run_is_added_to_those_on_another_base(
    workshop: Workshop, records: Records, tmp_path: Path
) -> None:
    """The file stays as it was."""
    path = tmp_path / "other.jsonl"
    record = record_of(records, "base")
    append_record(path, {**record, "base": {**record["base"], "fingerprint": "other"}})
    before = path.read_bytes()

    with pytest.raises(ShapeError, match="has runs on the base other"):
        run_missing(workshop, [Run(KINDS["full"], 0)], path, say=quiet)

    assert path.read_bytes() == before


@pytest.mark.parametrize("line", ["{}", "no JSON", '{"variant": {"rows": "many"}, "seed": 0}'])
def test_a_line_that_is_no_record_is_named(line: str, tmp_path: Path) -> None:
    """By its number."""
    path = tmp_path / "records.jsonl"
    path.write_text(line + "\n")

    with pytest.raises(ShapeError, match="line 1 is no record"):
        read_records(path)
