"""`bench hitrate`: a tiny run with real limits, and what the references do to a table."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import engram_store
from engram_store.bench import HitrateWorkload, Report, run_bench
from engram_store.bench import hitrate as bench
from engram_store.bench.device import memory_group
from engram_store.bench.hitrate import WRITERS
from engram_store.bench.hitrate_place import (
    MOST_WARM_UP,
    HitratePlace,
    open_hitrate_place,
)
from engram_store.bench.hitrate_writers import (
    MERGED,
    MMAP,
    PWRITE,
    STORE,
    InPlaceTable,
    Trained,
    TrainerOrder,
    _Steps,
    run_trainer,
)
from engram_store.bench.report import print_report
from engram_store.bench.workplace import LAYER
from engram_store.cli import main
from engram_store.errors import ConfigError, EngramStoreError

TINY = HitrateWorkload(rows=50_000, tokens=256, repetitions=2, trained_steps=3, shares=(1.0,))


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Made by the first test, used again by the others."""
    return tmp_path_factory.mktemp("bench")


@pytest.fixture
def place(directory: Path) -> HitratePlace:
    return open_hitrate_place(TINY, directory, lambda _: None)


def check_memory_group() -> None:
    """Skip where no memory cgroup can be made."""
    try:
        with memory_group(1 << 30):
            pass
    except OSError as error:
        pytest.skip(f"no memory cgroup can be made here: {error}")


# ---------------------------------------------------------------------- the whole


@pytest.mark.slow
def test_all_writers_are_measured_with_the_same_memory(
    directory: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Real processes, through the command line: a curve for each, and nothing left behind."""
    check_memory_group()
    seen: list[TrainerOrder] = []

    def watched(self: HitratePlace, order: TrainerOrder) -> Trained:
        seen.append(order)
        return run_trainer(order)

    monkeypatch.setattr(HitratePlace, "run", watched)
    sizes = ("--rows", "50000", "--tokens", "256", "--steps", "2", "--trained-steps", "3")

    with pytest.raises(SystemExit) as end:
        main(["bench", "hitrate", "--json", *sizes, "--dir", str(directory)])

    assert not end.value.code
    data = json.loads(capsys.readouterr().out)
    assert [order.writer for order in seen] == list(WRITERS)
    assert len({(order.limit_bytes, order.warm_up, order.first_step) for order in seen}) == 1
    # So small a table that all points of the curve need the same memory.
    assert all(len(series["x"]) == 1 for series in data["series"])
    assert [series["name"] for series in data["series"]] == [*WRITERS, *WRITERS]
    lines = {result["name"]: result for result in data["results"]}
    store, *others = lines
    assert store.endswith(f": {STORE}")
    assert all(line["repetitions"] == 2 for line in lines.values())
    assert set(lines[store]["ratio_to"]) == {others[1], others[2]}
    found = {(q["name"].partition(": ")[2], q["unit"]): q["median"] for q in data["quantities"]}
    for writer in WRITERS:
        assert found[writer, "reads of 4 KiB a step"] >= 0
        assert found[writer, "re-faults a step"] >= 0
        assert ((writer, "% of rows in shared memory") in found) == (writer in (STORE, MERGED))
    assert found[STORE, "% of rows in shared memory"] > 20
    assert all(target["met"] is None for target in data["targets"])
    assert any("take more --rows" in note for note in data["notes"])
    assert not list(directory.glob("hitrate-rows*"))


def test_without_cgroups_the_reason_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before anything is made."""

    def refuse(_: int) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(bench, "memory_group", refuse)

    report = run_bench("hitrate", TINY, tmp_path, lambda _: None)
    print_report(report)

    assert [target.measured for target in report.targets] == [None, None]
    out = " ".join(capsys.readouterr().out.split())
    assert "no memory cgroup can be made here ([Errno 13] Permission denied)" in out
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------------- the store


def test_the_store_is_measured_from_the_same_state_each_time(place: HitratePlace) -> None:
    """Its segments as training left them, or merged into one; with the same rows."""
    order = place.order_of(1 << 30)
    first = place.train_store(order)
    rows = np.arange(20_000, dtype=np.int32)
    root = order.path(order.store)
    with engram_store.open(root) as store:
        assert store.step == TINY.trained_steps
        before = store.read_rows(LAYER, rows)

    trained = run_trainer(replace(first, warm_up=1))
    assert len(trained.step_ms) == len(trained.reads) == TINY.repetitions
    assert trained.overlay_share is not None
    assert 0 < trained.overlay_share < 1
    for writer in (STORE, MERGED):
        place.go_back(replace(first, writer=writer))
        with engram_store.open(root, "train") as store:
            assert store.step == TINY.trained_steps
            np.testing.assert_array_equal(store.read_rows(LAYER, rows), before)
            if writer == MERGED:
                assert len(store._engine.tables[LAYER].segments) == 1


def test_the_warm_up_fills_shared_memory_but_ends(place: HitratePlace) -> None:
    """Little memory is filled soon; much is not waited for."""
    little = place.train_store(place.order_of(place.least_limit_bytes))
    much = place.train_store(place.order_of(1 << 30))

    assert 6 <= little.warm_up <= much.warm_up == MOST_WARM_UP
    assert little.memory_bytes < place.least_limit_bytes


def test_points_that_are_too_small_are_one(place: HitratePlace) -> None:
    """The least with which training is possible; larger ones stay as they are."""
    least, table = place.least_limit_bytes, place.table_bytes
    large = (least + table) / table
    place = replace(place, workload=replace(TINY, shares=(1e-9, 1e-6, large)))

    limits = bench._limits(place)

    assert limits == [least, pytest.approx(least + table, abs=1)]


# ---------------------------------------------------------------------- in place


def test_both_references_leave_the_same_table(place: HitratePlace) -> None:
    """Every row of a step is updated, and no other, whichever way it is written."""
    with np.load(place.order.path(place.order.updates)) as updates:
        rows = updates[str(TINY.trained_steps)]
    files = [place.order.path(name) for name in (place.order.rows_file, place.order.sums_file)]
    start = [path.read_bytes() for path in files]
    left = {}
    for writer in (MMAP, PWRITE):
        for path, content in zip(files, start, strict=True):
            path.write_bytes(content)
        table = InPlaceTable(replace(place.order, writer=writer))
        table.step(rows)
        left[writer] = [path.read_bytes() for path in files]
        table.step(rows)
        assert files[0].read_bytes() != left[writer][0]

    sums = np.frombuffer(left[PWRITE][1], np.float32)
    np.testing.assert_array_equal(np.flatnonzero(sums), rows)
    assert left[MMAP][1] == left[PWRITE][1]
    first, *last = (
        np.frombuffer(content, np.uint16).reshape(-1, place.spec.dim)
        for content in (start[0], left[MMAP][0], left[PWRITE][0])
    )
    for after in last:
        np.testing.assert_array_equal(np.flatnonzero((first != after).any(axis=1)), rows)
    # Rounded at random by row and slot: a value is one of the two beside the exact one.
    steps = last[0].astype(np.int32) - last[1].astype(np.int32)
    assert np.abs(steps[rows]).max() <= 1


def test_references_read_ahead_only_while_something_is_cold(place: HitratePlace) -> None:
    """In memory, advice would cost them time for nothing."""
    table = InPlaceTable(replace(place.order, writer=MMAP))
    asked: list[int] = []

    class Counts:
        name = "counts"

        def start(self, ranges: np.ndarray[Any, Any]) -> None:
            asked.append(len(ranges))

    table._reader = Counts()
    rows = np.arange(0, 2_000, 2, dtype=np.int32)

    table.step(rows)
    pages = sum(asked)
    table.step(rows)

    assert pages > 0
    assert sum(asked) == pages


def test_only_steps_after_the_warm_up_count(place: HitratePlace) -> None:
    """And the end of the warm-up is told once."""
    steps = _Steps(replace(place.order, warm_up=2, steps=3))

    ended = [steps.done() for _ in range(5)]

    assert ended == [False, True, False, False, False]
    assert len(steps.step_ms) == len(steps.reads) == 3


# ---------------------------------------------------------------------- what came of it


def trained(ms: float) -> Trained:
    return Trained(step_ms=[ms, 3 * ms], reads=[10.0, 30.0], written_bytes=8_000_000, faults=6)


def test_a_third_of_the_table_is_judged_by_means(place: HitratePlace) -> None:
    """Points that are not near a third are not."""
    third = {STORE: trained(10), MERGED: trained(9), MMAP: trained(30), PWRITE: trained(20)}
    whole = dict.fromkeys(WRITERS, trained(1))
    report = Report(bench="hitrate", machine={}, workload={})
    table = place.table_bytes

    bench._write(report, place, {round(0.34 * table): third, table: whole})

    assert [target.measured for target in report.targets] == [3.0, 2.0]
    assert [target.met for target in report.targets] == [True, False]
    curves = {(series.name, series.y_label): series.y for series in report.series}
    assert curves[MMAP, "ms a step"] == (60.0, 2.0)
    assert curves[STORE, "device reads of 4 KiB a step"] == (20.0, 20.0)
    values = {(q.name, q.unit): q.median for q in report.quantities}
    assert values["0.34 of the table: store", "MB written a step"] == 4.0
    assert values["0.34 of the table: store", "re-faults a step"] == 3.0
    assert bench._judged([0.25, 0.5], [third, whole]) is None


def test_a_point_with_too_little_memory_is_left_out(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And said so; any other failure is one."""
    check_memory_group()
    how = ["-9: it said nothing", "1: it said why"]

    def fails(_self: HitratePlace, _order: TrainerOrder) -> Trained:
        raise EngramStoreError(f"it ended with exit code {how[0]}")

    monkeypatch.setattr(HitratePlace, "run", fails)

    report = run_bench("hitrate", TINY, directory, lambda _: None)

    assert not report.timings
    assert [target.measured for target in report.targets] == [None, None]
    assert "no point, the kernel ended a trainer for want of memory" in report.notes[-1]
    how.pop(0)
    with pytest.raises(EngramStoreError, match="exit code 1: it said why"):
        run_bench("hitrate", TINY, directory, lambda _: None)


@pytest.mark.parametrize(
    "wrong",
    [{"shares": ()}, {"shares": (0.0, 1.0)}, {"shares": (1.0, 0.5)}, {"trained_steps": 0}],
    ids=str,
)
def test_settings_that_make_no_sense_are_refused(wrong: dict[str, Any], tmp_path: Path) -> None:
    """Before anything is made."""
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        run_bench("hitrate", replace(TINY, **wrong), tmp_path, lambda _: None)

    assert not list(tmp_path.iterdir())


def test_a_trainer_that_fails_says_why(tmp_path: Path) -> None:
    """Not a number, but its error."""
    order = TrainerOrder(
        writer=MMAP, layer=LAYER, dim=64, room=str(tmp_path), store="none", first_step=0,
        warm_up=0, steps=1, most_rows=1, limit_bytes=0, memory_bytes=0,
    )  # fmt: skip

    with pytest.raises(EngramStoreError, match=r"(?s)exit code 1.*hitrate-updates\.npz"):
        run_trainer(order)


def test_a_disk_that_is_too_small_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before it is full."""
    check_memory_group()
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr("engram_store.bench.hitrate_place.shutil.disk_usage", lambda _: usage)

    with pytest.raises(ConfigError, match=r"needs about 38,400,000 bytes .* which has 1,000; give"):
        run_bench("hitrate", TINY, tmp_path, lambda _: None)

    assert not list(tmp_path.iterdir())
