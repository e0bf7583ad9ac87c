"""`bench cold`: a tiny table that really leaves memory, and what happens without fio."""

import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from engram_store.bench import ColdWorkload, run_bench
from engram_store.bench import cold as bench
from engram_store.bench.cold import DEVICE, FETCH, TRAIN, bench_cold
from engram_store.bench.cold_peers import PEERS, ColdPeer, DeviceRate, fio_missing, run_fio
from engram_store.bench.cold_place import ColdPlace, open_cold_place
from engram_store.bench.device import device_of
from engram_store.bench.report import print_report
from engram_store.bench.workplace import LAYER
from engram_store.engine.memory import PAGE_BYTES
from engram_store.errors import ConfigError, EngramStoreError

TINY = ColdWorkload(
    rows=200_000, tokens=256, repetitions=2, windows=2, look_ahead=1, fio_seconds=0.1
)
_RATE = DeviceRate(reads_per_second=50_000.0, cpu_us_per_read=2.0)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Made by the first test, used again by the others."""
    path = tmp_path_factory.mktemp("bench")
    if device_of(path) is None:
        pytest.skip("the temporary directory is not on a block device: nothing in it is ever cold")
    return path


@pytest.fixture
def place(directory: Path) -> Iterator[ColdPlace]:
    with open_cold_place(TINY, directory, lambda _: None) as opened:
        yield opened


def pages_under(place: ColdPlace, number: int) -> int:
    """Distinct pages of the base that a window's rows lie on."""
    rows = place.batches[number].rows.astype(np.int64)
    return int(np.unique(rows * place.spec.row_bytes // PAGE_BYTES).size)


def test_every_part_is_measured_beside_what_fio_reached(
    directory: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Lines with peers beside them, rates, shares of the device, targets, curves."""
    monkeypatch.setattr(bench, "fio_missing", lambda: None)
    monkeypatch.setattr(bench, "run_fio", lambda _files, _seconds: _RATE)

    report = run_bench("cold", TINY, directory, lambda _: None)

    data = json.loads(json.dumps(report.to_json()))
    measured = [peer.traits.name for peer in PEERS if peer.missing is None]
    lines = {result["name"]: result for result in data["results"]}
    ours = [f"{FETCH}: a window", f"{TRAIN}: a window"]
    assert list(lines) == [*ours, *measured]
    for name in ours:
        assert set(lines[name]["ratio_to"]) == set(measured)
    assert lines[ours[0]]["repetitions"] == TINY.repetitions * TINY.windows
    assert lines[ours[1]]["repetitions"] == TINY.repetitions
    found = {(q["name"], q["unit"]): q for q in data["quantities"]}
    assert found[DEVICE, "reads of 4 KiB a second"]["median"] == _RATE.reads_per_second
    for name in (FETCH, TRAIN):
        rate = found[name, "reads of 4 KiB a second"]["median"]
        share = found[name, "% of fio's reads a second"]["median"]
        assert share == pytest.approx(100 * rate / _RATE.reads_per_second, rel=1e-3)
        assert found[name, "bytes read for a byte of rows"]["median"] > 2
    targets = {target["what"]: target for target in data["targets"]}
    for name in (FETCH, TRAIN):
        share = found[name, "% of fio's reads a second"]["median"]
        target = targets[f"{name}: reads a second, of fio's"]
        assert target["measured"] == pytest.approx(share, rel=1e-3)
        assert target["met"] == (target["measured"] >= 85)
        cpu = found[name, "us of CPU a read"]["median"]
        target = targets[f"{name}: CPU time of a page"]
        assert target["measured"] == pytest.approx(cpu, rel=1e-3)
    assert {series["name"] for series in data["series"]} == {FETCH, TRAIN, DEVICE}
    assert all(series["x"] == [1, 2] for series in data["series"])
    print_report(report)
    assert "announce + rows: a" in capsys.readouterr().out


def test_without_fio_the_rest_is_measured(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The share is not, and a note says how to install it."""
    monkeypatch.setenv("PATH", str(directory))

    report = bench_cold(TINY, directory, lambda _: None)

    met = {target.what: target.met for target in report.targets}
    assert met[f"{FETCH}: reads a second, of fio's"] is None
    assert met[f"{TRAIN}: reads a second, of fio's"] is None
    assert met[f"{FETCH}: CPU time of a page"] is not None
    assert any("fio is not installed" in n and "apt install fio" in n for n in report.notes)
    assert DEVICE not in {series.name for series in report.series}


def test_fio_that_fails_half_way_leaves_nothing_half_judged(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it measured before is not used."""
    runs: list[float] = []

    def fails_later(_files: list[Path], seconds: float) -> DeviceRate:
        runs.append(seconds)
        if len(runs) > 3:
            raise EngramStoreError("fio ended with exit code 1 and no result: io_uring is off")
        return _RATE

    monkeypatch.setattr(bench, "fio_missing", lambda: None)
    monkeypatch.setattr(bench, "run_fio", fails_later)

    report = bench_cold(TINY, directory, lambda _: None)

    assert len(runs) == 4
    assert any("io_uring is off" in note for note in report.notes)
    assert [target.measured is None for target in report.targets] == [True, True, False, False]
    units = {quantity.unit for quantity in report.quantities}
    assert "% of fio's reads a second" not in units
    assert "us of CPU a read" in units


def test_after_evicting_nothing_is_in_memory_or_believed_to_be(place: ColdPlace) -> None:
    """Also pages that a mapping had in its page tables; reading asks for each page once."""
    place.fetch(0)
    place.train()

    assert place.evict() < 0.01

    assert place.table.paging is not None
    watched = list(place.table.paging._watched.values())
    assert watched
    assert sum(int(residency.pages.sum()) for residency in watched) == 0
    reading = place.fetch(0)
    assert reading.pages == pages_under(place, 0)
    assert reading.device_bytes >= reading.pages * PAGE_BYTES
    assert place.fetch(0).pages == 0


def test_training_reads_what_is_cold_and_goes_back_to_step_0(place: ColdPlace) -> None:
    """The same again: nothing is left in shared memory."""
    found = []
    for _ in range(2):
        place.evict()
        found.append(place.train())
        assert place.store.step == 0

    assert all(reading.windows == TINY.windows for reading in found)
    assert all(reading.rows == sum(b.rows.size for b in place.batches) for reading in found)
    assert all(reading.pages >= pages_under(place, 0) for reading in found)
    with place.store.announce(place.batches[0].tokens) as window:
        rows, _ = window.rows(LAYER)
        flat = np.fromfile(place.flat_file, rows.dtype).reshape(-1, place.spec.dim)
        np.testing.assert_array_equal(rows, flat[place.batches[0].rows])


def test_a_kept_table_is_used_again(directory: Path) -> None:
    """And one of another size is made anew."""
    with open_cold_place(TINY, directory, lambda _: None) as first:
        before = first.flat_file.stat().st_mtime_ns
    said: list[str] = []

    with open_cold_place(TINY, directory, said.append) as again:
        assert again.flat_file.stat().st_mtime_ns == before
    with open_cold_place(replace(TINY, rows=100_000), directory, said.append) as smaller:
        assert smaller.flat_file.stat().st_size == smaller.spec.rows * smaller.spec.row_bytes

    steps = ["reading text", "making the table", "copying the table into one file"]
    assert said == [steps[0], *steps]


@pytest.mark.parametrize("peer", PEERS, ids=lambda peer: peer.traits.name)
def test_peers_read_the_rows_that_were_asked_for(peer: ColdPeer, tmp_path: Path) -> None:
    """In the order of the request, repeats included."""
    if peer.missing is not None:
        pytest.skip(peer.missing)
    table = np.random.default_rng(0).integers(0, 1 << 16, (1000, 8), np.uint16)
    file = tmp_path / "rows.bin"
    table.tofile(file)
    rows = np.array([999, 3, 3, 500, 0])

    np.testing.assert_array_equal(peer.read(file, 8, rows), table[rows])


def fake_fio(room: Path, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    program = room / "fio"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{room}{os.pathsep}{os.environ['PATH']}")


def test_what_fio_says_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also after lines that are not JSON."""
    job = {
        "usr_cpu": 10.0,
        "sys_cpu": 30.0,
        "read": {"iops": 1234.5, "runtime": 2000, "total_ios": 400_000},
    }
    answer = json.dumps({"jobs": [job]})
    fake_fio(tmp_path, f"echo note: something\necho '{answer}'", monkeypatch)

    rate = run_fio([tmp_path / "a", tmp_path / "b"], 1.0)

    assert rate == DeviceRate(reads_per_second=1234.5, cpu_us_per_read=2.0)


def test_fio_that_cannot_use_io_uring_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its last words are in the error."""
    fake_fio(tmp_path, "echo 'Operation not permitted' >&2; exit 1", monkeypatch)

    with pytest.raises(EngramStoreError, match="exit code 1 and no result: Operation not"):
        run_fio([tmp_path / "a"], 1.0)


def test_fio_reads_a_file_that_is_there(directory: Path) -> None:
    """The real program, where there is one."""
    if (reason := fio_missing()) is not None:
        pytest.skip(reason)
    file = directory / "for-fio.bin"
    file.write_bytes(bytes(1 << 20))
    try:
        rate = run_fio([file], 0.1)
    except EngramStoreError as error:
        pytest.skip(f"fio cannot read with io_uring here: {error}")

    assert rate.reads_per_second > 0
    assert rate.cpu_us_per_read >= 0
    assert file.read_bytes() == bytes(1 << 20)


@pytest.mark.parametrize(
    "wrong", [{"windows": 0}, {"look_ahead": -1}, {"fio_seconds": 0.0}], ids=str
)
def test_settings_that_make_no_sense_are_refused(wrong: dict[str, float], tmp_path: Path) -> None:
    """Before anything is made."""
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        run_bench("cold", replace(TINY, **wrong), tmp_path, lambda _: None)  # type: ignore[arg-type]

    assert not list(tmp_path.iterdir())


def test_a_disk_that_is_too_small_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before it is full."""
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr("engram_store.bench.cold_place.shutil.disk_usage", lambda _: usage)

    with pytest.raises(ConfigError, match=r"needs about 56,320,000 bytes .* has 1,000; give"):
        run_bench("cold", TINY, tmp_path, lambda _: None)

    assert not list(tmp_path.iterdir())
