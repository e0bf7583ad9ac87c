"""`bench train`: a tiny run through real training, and how its numbers are judged."""

import importlib.util
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from engram_store.bench import Report, run_bench, train, train_probe
from engram_store.bench.harness import Quantity, Timing
from engram_store.bench.plots import plot_report
from engram_store.bench.report import print_report
from engram_store.bench.train_judge import (
    ADAM,
    CONSTANT,
    CONSTANT_FORWARD,
    EMBEDDING,
    PROCESS,
    STORE,
    Limits,
    judge,
    limited_notes,
    limited_series,
    seal_name,
)
from engram_store.bench.train_limited import (
    LEAST_LIMIT,
    SHARE,
    Limited,
    LimitedPlace,
    Pass,
    _train,
)
from engram_store.bench.train_place import (
    VOCABULARY,
    TrainPlace,
    TrainWorkload,
    fresh_store,
    make_train_recipe,
    read_train_text,
)
from engram_store.bench.train_probe import reads_per_second
from engram_store.bench.workplace import LAYER
from engram_store.cli import main
from engram_store.engine.memory import PAGE_BYTES
from engram_store.errors import ConfigError
from engram_store.types import OptimizerKind

TINY = TrainWorkload(
    rows=20_000, tokens=128, repetitions=5, limited_rows=20_000, limited_tokens=128, limited_steps=2
)


def say(_: str) -> None:
    """Nobody listens."""


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stores made by one test are used again by the others."""
    return tmp_path_factory.mktemp("bench")


@pytest.fixture(scope="module")
def store(directory: Path) -> Path:
    """A store at step 0."""
    text = read_train_text(2, TINY.tokens)
    root = directory / "one.engram"
    fresh_store(root, make_train_recipe(TINY, text), TINY.dim, OptimizerKind.ADAM, say)
    return root


def refuse(_: int) -> None:
    """As where cgroups cannot be made."""
    raise PermissionError(13, "Permission denied")


@pytest.mark.slow
def test_every_line_trains_and_is_compared(
    directory: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Through the command line; what cannot be measured here says why."""
    pytest.importorskip("torch")
    monkeypatch.setattr("engram_store.bench.train_limited.memory_group", refuse)
    sizes = ("--rows", "20000", "--tokens", "128", "--steps", "5")
    small = ("--limited-rows", "20000", "--limited-tokens", "128", "--limited-steps", "2")

    with pytest.raises(SystemExit) as end:
        main(["bench", "train", "--json", *sizes, *small, "--dir", str(directory)])

    assert not end.value.code
    data = json.loads(capsys.readouterr().out)
    steps = {result["name"]: result["repetitions"] for result in data["results"]}
    assert {name: steps.get(name) for name in (CONSTANT, CONSTANT_FORWARD, STORE, PROCESS)} == {
        CONSTANT: 10, CONSTANT_FORWARD: 5, STORE: 5, PROCESS: 5,
    }  # fmt: skip
    assert steps[ADAM] == steps[EMBEDDING] == 5
    values = {quantity["name"]: quantity for quantity in data["quantities"]}
    for name in (STORE, PROCESS, ADAM, EMBEDDING):
        assert values[f"{name}: speed"]["unit"] == "tokens/s"
        assert values[f"{name}: rows changed"]["median"] > 90
    assert values["disk: random reads of 4 KiB"]["median"] > 0
    compared = {result["name"]: set(result["ratio_to"]) for result in data["results"]}
    assert compared[STORE] == {CONSTANT, CONSTANT_FORWARD}
    assert compared[ADAM] == {EMBEDDING, CONSTANT}
    assert any("Permission denied" in note for note in data["notes"])


@pytest.mark.slow
def test_the_limited_process_counts_both_passes(directory: Path, store: Path) -> None:
    """Without a limit here: it is the same code with one."""
    pytest.importorskip("torch")
    text = read_train_text(2, TINY.tokens)
    place = LimitedPlace.make(store, text.cut(TINY.limited_tokens), text.narrow, table_bytes=1)

    limited = Limited.from_json(_train(replace(place.order, depth=2)))

    assert place.limit_bytes == LEAST_LIMIT
    assert [len(p.step_ms) for p in (limited.first, limited.second)] == [2, 2]
    assert limited.changed > 0.9
    assert limited.memory_bytes > 0
    assert limited.first.wait_seconds >= 0


class _Recording:
    """A reader that only notes what it was asked for."""

    name = "recording"

    def __init__(self) -> None:
        self.asked: list[NDArray[np.int64]] = []

    def start(self, ranges: NDArray[np.int64]) -> None:
        self.asked.append(ranges.copy())


def test_the_disk_is_asked_for_every_page_once(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In ascending order, through the store's own reader, a slice before they are used."""
    reader = _Recording()
    monkeypatch.setattr(train_probe, "choose_reader", lambda: reader)
    monkeypatch.setattr(train_probe, "SLICE_PAGES", 64)

    assert reads_per_second(store, LAYER) > 0

    addresses, lengths = np.concatenate(reader.asked).T
    assert addresses.size > 64
    assert (np.diff(addresses) > 0).all()
    assert (lengths == PAGE_BYTES).all()
    assert [len(ranges) for ranges in reader.asked[:2]] == [64, 64]


def test_commonest_tokens_keep_their_own_id() -> None:
    """And every other one shares the last."""
    text = read_train_text(4, 256)

    counts = np.bincount(text.steps.reshape(-1))
    assert text.narrow[int(np.argmax(counts))] == 0
    assert text.narrow.max() <= VOCABULARY - 1
    assert np.unique(text.narrow).size == min(text.narrow.size, VOCABULARY)


def test_text_is_cut_into_smaller_steps() -> None:
    """Of whole sequences, in the same order."""
    text = read_train_text(3, 1024)

    np.testing.assert_array_equal(text.cut(512).reshape(-1), text.steps.reshape(-1))
    assert text.cut(512).shape == (6, 2, 256)
    assert text.cut(2048).shape == (1, 8, 256)
    with pytest.raises(ConfigError, match=r"300 tokens .* sequences of 256; give a multiple"):
        text.cut(300)


def test_look_ups_are_those_of_the_recipe() -> None:
    """Unique rows and inverse give back every row that the recipe names."""
    text = read_train_text(2, 128)
    recipe = make_train_recipe(TINY, text)

    place = TrainPlace.of(recipe, TINY.dim, text.steps, text.narrow)

    for looked, tokens in zip(place.looked, text.steps, strict=True):
        np.testing.assert_array_equal(looked.rows[looked.inverse], recipe.rows(LAYER, tokens))
    assert place.most_rows == max(looked.rows.size for looked in place.looked)


def test_steps_that_cannot_be_cut_are_refused(directory: Path) -> None:
    with pytest.raises(ConfigError, match=r"300 tokens a step.* such as 256"):
        run_bench("train", replace(TINY, tokens=300), directory, say)


def test_without_torch_it_says_what_to_install(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before anything is made."""
    find = importlib.util.find_spec
    monkeypatch.setattr(train, "find_spec", lambda name: None if name == "torch" else find(name))

    with pytest.raises(ConfigError, match=r"needs torch: pip install"):
        run_bench("train", TINY, directory / "never", say)

    assert not (directory / "never").exists()


def test_a_line_that_does_not_train_its_rows_is_not_published(directory: Path) -> None:
    text = read_train_text(1, 128)
    place = TrainPlace.of(make_train_recipe(TINY, text), TINY.dim, text.steps, text.narrow)
    lines = train._Lines(TINY, directory, place, say)

    with pytest.raises(train.UntrainedError, match=r"store: only 3\.0% of the rows"):
        lines._check(STORE, 0.03)


# ---------------------------------------------------------------------- judging


def made_up(
    second_ms: float, pages: int, *, table: int = SHARE * LEAST_LIMIT, wait: float = 0.0
) -> Limits:
    """Ten steps of a model that takes 100 ms, on a disk of 1,000 reads a second."""
    first = Pass(step_ms=[500.0] * 10, wait_seconds=4, pages=9, cold_rows=9, faults=0, late=10)
    second = Pass(
        step_ms=[second_ms] * 10, wait_seconds=wait, pages=10 * pages, cold_rows=1, faults=0, late=1
    )
    limited = Limited(
        constant_ms=[100.0] * 5, first=first, second=second, memory_bytes=1 << 30, changed=1.0
    )
    return Limits(table, LEAST_LIMIT, 1000.0, {2: limited})


def judged(limits: Limits, **line_ms: float) -> dict[str, tuple[float | None, bool | None]]:
    """(measured, met) by target, of lines that take so many ms a step."""
    report = Report(bench="train", machine={"cores": 2}, workload={})
    names = {"store": STORE, "constant": CONSTANT, "adam": ADAM, "embedding": EMBEDDING}
    report.timings = [Timing(names[line], np.array([ms])) for line, ms in line_ms.items()]
    report.quantities = [Quantity(seal_name(STORE), "CPU ms a step", np.array([2.0]))]
    judge(report, limits)
    return {target.what: (target.measured, target.met) for target in report.targets}


def test_the_cost_of_a_store_counts_its_seals() -> None:
    """2 ms of CPU on 2 cores are 1 ms of a step."""
    found = judged(made_up(100, 1), store=101.0, constant=100.0)

    cost, met = found["the store costs, over constant rows"]
    assert met
    assert cost == pytest.approx(2.0)
    assert found["the store costs, commits in the background"] == (None, None)
    assert found["tokens/s with Adam, of nn.Embedding"] == (None, None)


def test_speed_beside_an_embedding_is_judged() -> None:
    found = judged(made_up(100, 1), constant=90.0, adam=100.0, embedding=150.0)

    assert found["tokens/s with Adam, of nn.Embedding"] == (1.5, True)


@pytest.mark.parametrize(
    ("second_ms", "pages", "waited", "waiting", "over"),
    [
        (104.0, 50, 0.02, (pytest.approx(100 * 0.02 / 1.04), True), (1.04, True)),
        (240.0, 200, 1.4, (None, None), (1.2, True)),
        (300.0, 200, 2.0, (None, None), (1.5, False)),
    ],
    ids=["the disk keeps up", "the disk is the bound", "slower than the disk"],
)
def test_little_memory_is_judged_by_what_the_disk_can_do(
    second_ms: float, pages: int, waited: float, waiting: object, over: object
) -> None:
    limits = made_up(second_ms, pages, wait=waited)

    found = judged(limits)

    assert found["waiting, table 4 times the memory, look-ahead 2"] == waiting
    assert found["step over its bound, table 4 times the memory, look-ahead 2"] == over
    unavoidable = [note for note in limited_notes(limits) if "cannot be avoided" in note]
    assert bool(unavoidable) == (pages > 100)


def test_a_table_that_is_too_small_says_so() -> None:
    limits = made_up(100, 1, table=LEAST_LIMIT)

    found = judged(limits)

    assert found["step over its bound, table 4 times the memory, look-ahead 2"] == (None, None)
    assert any("take more --limited-rows" in note for note in limited_notes(limits))


def test_lines_are_drawn_and_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Both passes are one curve for each look-ahead."""
    limits = made_up(100, 1)
    series = limited_series(limits)
    report = Report(
        bench="train",
        machine={"cores": 2, "cpu": "one", "load_average": [0.0]},
        workload={
            "tokens": 1, "lookups_per_step": 1, "unique_rows_per_step": 1, "row_bytes": 1,
            "table_rows": 1,
        },
        timings=limits.timings(),
        quantities=limits.quantities(),
        series=series,
    )  # fmt: skip
    judge(report, limits)

    print_report(report)

    assert "look-ahead 2, second pass" in capsys.readouterr().out
    assert [curve.y for curve in series] == [(*[500.0] * 10, *[100.0] * 10)]
    pytest.importorskip("matplotlib")
    assert plot_report(report, tmp_path / "train.png").stat().st_size > 0
