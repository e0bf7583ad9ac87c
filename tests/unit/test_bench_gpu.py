"""`bench train --device cuda`: a tiny run of the same code on a pretended card, and its verdict."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from engram_store.bench import Report, run_bench
from engram_store.bench.gpu import (
    BACKGROUND,
    CONSTANT,
    SMALL,
    STORE,
    TABLES,
    bench_gpu,
    judge_gpu,
    peak_name,
)
from engram_store.bench.gpu_place import BaseSize, GpuPlace, GpuWorkload, fold_vocabulary
from engram_store.bench.harness import Quantity, Timing
from engram_store.bench.report import print_report
from engram_store.cli import main
from engram_store.errors import ConfigError
from tests.devices import CPU, pretend_card

TINY = GpuWorkload(
    rows=16_000,
    tokens=64,
    repetitions=2,
    tables=2,
    sequence=32,
    dim=4,
    heads=2,
    base=BaseSize(
        hidden=32, blocks=3, heads=2, kv_heads=1, head_dim=16, mlp=48, vocabulary=200
    ),
)  # fmt: skip


class PretendedCard:
    """A CPU."""

    device = CPU

    def __init__(self) -> None:
        self.limited = 0
        self.peaks = 0

    def limit(self, vram_bytes: int) -> None:
        self.limited = vram_bytes

    def begin_peak(self) -> None:
        self.peaks += 1

    def peak_bytes(self) -> int:
        return 1000

    def describe(self) -> dict[str, Any]:
        return {"gpu": "none"}


def say(_: str) -> None:
    """Nobody listens."""


@pytest.mark.slow
def test_every_arm_trains_and_is_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On streams that finish late; with a trace."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    pretended, card = pretend_card(monkeypatch), PretendedCard()
    workload = replace(TINY, trace=tmp_path / "trace.json")

    report = bench_gpu(workload, tmp_path, say, card)
    torch.set_num_threads(threads)

    data = json.loads(json.dumps(report.to_json()))
    steps = {result["name"]: result["repetitions"] for result in data["results"]}
    assert steps == {CONSTANT: 6, STORE: 2, BACKGROUND: 2, SMALL: 2, TABLES: 2}
    values = {quantity["name"]: quantity["median"] for quantity in data["quantities"]}
    for name in (STORE, BACKGROUND, SMALL):
        assert values[f"{name}: rows changed"] > 90
        assert values[f"{name}: pinned"] > 0
        assert values[f"{name}: pageable copies"] == 0
        assert values[f"{name}: buffers on the GPU"] > 0
    compared = {result["name"]: set(result["ratio_to"]) for result in data["results"]}
    assert compared[STORE] == {CONSTANT, TABLES}
    assert json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert card.limited == 24 << 30
    assert data["workload"]["layers"] == [1, 2]
    assert all(target["measured"] is not None for target in data["targets"])
    assert pretended.registrar.wrong == []
    print_report(report)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a card")
def test_without_a_card_it_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Before anything is made."""
    with pytest.raises(ConfigError, match="needs a CUDA device"):
        run_bench("train-cuda", TINY, tmp_path / "never", say)
    assert not (tmp_path / "never").exists()

    with pytest.raises(SystemExit) as end:
        main(["bench", "train", "--device", "cuda", "--json"])
    assert end.value.code
    assert "leave --device out" in capsys.readouterr().err.replace("\n", " ")


def test_other_devices_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["bench", "train", "--device", "mps"])
    assert end.value.code
    assert "'cpu' or 'cuda'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"tables": 3}, "3 tables for a model of 3 blocks"),
        ({"tables": 0}, "0 tables"),
        ({"sequence": 48}, "64 tokens a step in sequences of 48; give a multiple, such as 48"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(change: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        replace(TINY, **change)


def test_tables_are_spread_over_the_blocks() -> None:
    """The second block is the first one; none has two."""
    reference = GpuWorkload(rows=1, tokens=2048, repetitions=1)
    assert reference.layers == (1, 9, 18, 27)
    assert TINY.layers == (1, 2)


def test_look_ups_are_those_of_the_recipe() -> None:
    """Also in smaller tables."""
    for smaller in (1, 4):
        place = GpuPlace.make(TINY, smaller=smaller)
        for step in place.steps[:2]:
            for layer, (rows, inverse) in step.found.items():
                expected = place.recipe.rows(layer, step.tokens)
                np.testing.assert_array_equal(rows[inverse], expected)
                assert place.most_rows(layer) >= rows.size


def test_rare_tokens_share_the_last_id() -> None:
    tokens = np.array([[3, 3, 3, 1], [1, 0, 2, 4]])

    folded, token_map = fold_vocabulary(tokens, np.array([10, 11, 12, 13, 14], np.int32), 3)

    np.testing.assert_array_equal(folded, [[0, 0, 0, 1], [1, 2, 2, 2]])
    np.testing.assert_array_equal(token_map, [13, 11, 10])


def judged(peaks: dict[str, float], **steps: float) -> list[tuple[float | None, bool | None]]:
    names = {"store": STORE, "constant": CONSTANT, "background": BACKGROUND}
    report = Report(bench="train-cuda", machine={}, workload={})
    report.timings = [Timing(names[arm], np.array([ms])) for arm, ms in steps.items()]
    report.quantities = [
        Quantity(peak_name(name), "GB", np.array([peak])) for name, peak in peaks.items()
    ]
    return [(target.measured, target.met) for target in judge_gpu(report, 4)]


def test_two_percent_and_the_same_memory_are_promised() -> None:
    """What was not measured is neither met nor missed."""
    found = judged({STORE: 20.0, SMALL: 20.0}, store=101.0, constant=100.0, background=103.0)
    assert found == [(1.01, True), (1.03, False), (1.0, True)]
    found = judged({STORE: 20.0, SMALL: 10.0}, store=101.0)
    assert found == [(None, None), (None, None), (2.0, False)]
