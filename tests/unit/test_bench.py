"""Benchmarks: their references do the same work, and their reports hold what they promise."""

import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engram_store.bench import ComparedWorkload, Report, Target, Timing, plain, run_bench
from engram_store.bench.harness import measure
from engram_store.bench.machine import _mount_of, chosen, describe_directory, revision_of
from engram_store.bench.report import print_report
from engram_store.bench.text import read_text
from engram_store.bench.window import numpy_hash
from engram_store.bench.workplace import Workplace, open_workplace
from engram_store.errors import ConfigError
from engram_store.optimizers import apply_reference, rule_step
from engram_store.types import HyperParameters, TableSpec

TINY = ComparedWorkload(rows=50_000, tokens=256, repetitions=2, peers=False)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Made by the first benchmark, used again by the others."""
    return tmp_path_factory.mktemp("bench")


@pytest.fixture
def place(directory: Path) -> Iterator[Workplace]:
    place = open_workplace(TINY, directory, lambda _: None)
    with place.store:
        yield place


def check_json(report: Report) -> dict[str, Any]:
    """The keys that readers of a result rely on."""
    data: dict[str, Any] = json.loads(json.dumps(report.to_json()))
    parts = {"bench", "machine", "workload", "results", "quantities", "series", "peers"}
    assert set(data) == parts | {"targets", "notes"}
    machine = {"cpu", "cores", "memory_bytes", "kernel", "python", "versions", "load_average"}
    machine |= {"date", "memory_limit_bytes", "transparent_huge_pages", "revision"}
    machine |= {"file_system", "mount_options", "device"}
    assert set(data["machine"]) == machine
    names = [result["name"] for result in data["results"]]
    assert len(set(names)) == len(names)
    for result in data["results"]:
        assert 0 < result["median_ms"] <= result["p95_ms"] <= result["max_ms"]
        assert set(result["ratio_to"]) <= set(names)
    for target in data["targets"]:
        assert set(target) == {"what", "target", "measured", "met", "limit"}
    return data


def test_window_reports_every_part_beside_its_reference(
    directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """hash, dedup, gather and their sum are measured, and printing them works."""
    report = run_bench("window", TINY, directory, lambda _: None)

    data = check_json(report)

    ratios = {result["name"]: set(result["ratio_to"]) for result in data["results"]}
    assert ratios["hash"] == {"numpy: hash"}
    assert ratios["window"] == {"numpy: window", "memory: window"}
    assert data["workload"]["lookups_per_step"] == 256 * 16
    assert len(data["targets"]) == 2
    print_report(report)
    assert "remap + gather" in capsys.readouterr().out


def test_update_reports_commits_and_freezes(
    directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Commits beside memory, numpy and torch; freezes and what a seal does to commits."""
    report = run_bench("update", TINY, directory, lambda _: None)

    data = check_json(report)

    names = {result["name"] for result in data["results"]}
    assert {"Engine.commit", "Store.commit", "push (NaN check)", "Engine.freeze"} <= names
    assert {target["what"] for target in data["targets"]} >= {"price of durability"}
    print_report(report)
    assert "Engine.freeze" in capsys.readouterr().out


def test_numpy_reference_hashes_like_the_recipe(place: Workplace) -> None:
    """What the kernels are compared with computes the same rows."""
    batch = place.batches[0]

    rows = numpy_hash(place, batch.tokens)

    np.testing.assert_array_equal(rows.reshape(-1), batch.lookups)


def test_flat_file_holds_the_base_rows(place: Workplace) -> None:
    """Rows that were not trained after the fold read the same from file and store."""
    rows = np.arange(0, place.spec.rows, 7, dtype=np.int32)
    untouched = rows[place.engine.tables[1].remap[rows] == 0]
    assert untouched.size > 100

    stored = place.store.read_rows(1, untouched)

    np.testing.assert_array_equal(stored, place.rows_in_memory()[untouched])


def test_a_kept_store_that_cannot_be_opened_is_made_again(tmp_path: Path) -> None:
    """Another version's, or one that a killed run left behind."""
    for _ in range(2):
        with open_workplace(TINY, tmp_path, lambda _: None).store as store:
            assert store.step == 9
        (tmp_path / "bench.engram" / "zarr.json").write_text("{}")


def test_plain_gather_copies_rows_in_request_order() -> None:
    """The reference gather is `table[rows]`."""
    table = np.random.default_rng(0).integers(0, 255, (500, 128), np.uint8)
    rows = np.array([7, 2, 499, 7], np.int32)
    out = np.zeros((4, 128), np.uint8)

    plain.gather(table, rows, out)

    np.testing.assert_array_equal(out, table[rows])


def test_plain_update_equals_the_optimizer_bit_for_bit() -> None:
    """The price of durability compares equal arithmetic."""
    random = np.random.default_rng(0)
    spec = TableSpec(layer=1, rows=300, dim=64)
    table = random.integers(0x3C00, 0x3E00, (300, 64)).astype(np.uint16)
    sums = random.random(300, np.float32)
    rows = random.permutation(300).astype(np.int32)[:100]
    gradients = random.standard_normal((100, 64), np.float32)
    step = rule_step(spec, 3, HyperParameters(lr=0.05))
    expected = apply_reference(spec, step, rows, table[rows], sums[rows, None], gradients)

    plain.rowwise_adagrad(64)(table, sums, rows, gradients, step.rate, step.eps, step.seed)

    np.testing.assert_array_equal(table[rows], expected[0])
    np.testing.assert_array_equal(sums[rows, None], expected[1])


def test_the_revision_of_a_checkout_says_whether_it_was_changed(tmp_path: Path) -> None:
    """An installed package has none."""
    if shutil.which("git") is None:
        pytest.skip("git is not installed")
    assert revision_of(tmp_path) is None
    (tmp_path / "file").write_text("one")
    person = ("-c", "user.name=x", "-c", "user.email=x@example.org")
    for command in (("init", "-q"), ("add", "file"), (*person, "commit", "-q", "-m", "x")):
        subprocess.run(["git", *command], cwd=tmp_path, check=True)

    clean = revision_of(tmp_path)
    (tmp_path / "file").write_text("two")

    assert clean is not None
    assert len(clean) == 12
    assert revision_of(tmp_path) == f"{clean}-dirty"


def test_the_file_system_is_that_of_the_directory(tmp_path: Path) -> None:
    """Found by its device number; options of the host's file system are left out."""
    mounts = (
        "27 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda rw,discard\n"
        "30 27 0:5 / /mnt/a\\040b rw,nosuid - overlay overlay rw,lowerdir=/secret\n"
    )

    assert _mount_of("254:0", mounts) == ("ext4", "/dev/vda", "rw,relatime")
    assert _mount_of("0:5", mounts) == ("overlay", "overlay", "rw,nosuid")
    assert _mount_of("9:9", mounts) is None
    assert set(describe_directory(tmp_path)) == {"file_system", "mount_options", "device"}


def test_a_kernel_setting_is_the_word_in_brackets(tmp_path: Path) -> None:
    """None where there is no such setting."""
    (tmp_path / "enabled").write_text("always [madvise] never\n")

    assert chosen(tmp_path / "enabled") == "madvise"
    assert chosen(tmp_path / "absent") is None


def test_text_has_the_asked_for_tokens_and_is_the_same_every_time() -> None:
    """Two runs on one machine measure the same windows."""
    first, second = read_text(4096, 512), read_text(4096, 512)

    assert first.tokens.shape == (8, 512)
    assert first.tokens.max() < first.token_map.size
    np.testing.assert_array_equal(first.tokens, second.tokens)


def test_cases_take_turns_and_see_all_batches() -> None:
    """Warm-up is left out, a case's own milliseconds win, and batches differ within a round."""
    seen: dict[str, list[int]] = {"a": [], "b": []}

    def case(name: str, batch: int) -> float:
        seen[name].append(batch)
        return float(len(seen[name]))

    timings = measure(
        {"a": lambda batch: case("a", batch), "b": lambda batch: case("b", batch)},
        repetitions=8,
        batches=4,
    )

    assert [timing.samples_ms.size for timing in timings] == [8, 8]
    assert timings[0].samples_ms[0] > 1
    assert all(a != b for a, b in zip(seen["a"], seen["b"], strict=True))
    assert set(seen["a"]) == set(seen["b"]) == {0, 1, 2, 3}


def test_target_tells_what_was_not_measured() -> None:
    """Without a measurement a target is neither met nor missed."""
    assert Target.times_faster("x", 5, None).met is None
    assert Target.times_faster("x", 5, 5.0).met is True
    assert Target.at_most("x", 5, 5.1).met is False
    assert Target.at_least("x", 5, 5.1, "GB/s").met is True
    assert Target.at_least("x", 5, None, "GB/s").met is None


def test_ratio_is_own_time_over_the_reference() -> None:
    """Below one is faster; references that were not measured are left out."""
    own, other = Timing("own", np.array([1.0])), Timing("other", np.array([4.0]))
    report = Report(
        bench="b",
        machine={},
        workload={},
        timings=[own, other],
        references={"own": ("other", "absent")},
    )

    assert report.ratios(own) == {"other": 0.25}


@pytest.mark.parametrize(
    "workload",
    [
        ComparedWorkload(rows=10, tokens=256, repetitions=2),
        ComparedWorkload(rows=50_000, tokens=3000, repetitions=2),
        ComparedWorkload(rows=50_000, tokens=256, repetitions=0),
    ],
)
def test_a_senseless_workload_is_refused(workload: ComparedWorkload, tmp_path: Path) -> None:
    """Before anything is made."""
    with pytest.raises(ConfigError):
        run_bench("window", workload, tmp_path, lambda _: None)

    assert not list(tmp_path.iterdir())
