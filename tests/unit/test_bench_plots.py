"""Pictures of reports: everything measured is drawn, and what cannot be drawn is refused first."""

import importlib
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engram_store.bench.harness import Quantity, Report, Series, Target, Timing
from engram_store.bench.plots import PlotError, _color, _tick, plot_path, plot_report
from engram_store.cli import main
from engram_store.errors import ConfigError

PNG = b"\x89PNG\r\n\x1a\n"


def full_report() -> Report:
    """One of everything."""
    report = Report(bench="window", machine={"cpu": "x"}, workload={"tokens": 5})
    report.timings = [
        Timing("own", np.array([1.0, 2.0])),
        Timing("other", np.array([100.0, 200.0])),
        Timing("rows", np.array([1.0]), 10),
        Timing("peer: rows", np.array([1.0]), 5),
    ]
    report.references = {"own": ("other",), "rows": ("peer: rows",)}
    report.quantities = [
        Quantity("bytes", "GB", np.array([1.0])),
        Quantity("none", "GB", np.array([0.0])),
        Quantity("factor", "x", np.array([1.0, 3.0])),
    ]
    report.series = [
        Series(name=name, x_label="rows", y_label="ms", x=(1.0, 100.0), y=(1.0, 2.0))
        for name in ("a", "b")
    ]
    report.targets = [
        Target.at_most("fast", 4, 2.0),
        Target.times_faster("slow", 5, 2.0),
        Target.at_least("unknown", 5, None, "GB/s"),
    ]
    return report


def test_a_report_becomes_a_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One panel each: curves, milliseconds, rows, two units, targets; every bar has its name."""
    pytest.importorskip("matplotlib", reason="matplotlib comes with engram-store[bench]")
    figure_class = importlib.import_module("matplotlib.figure").Figure
    seen: list[Any] = []
    original = figure_class.savefig

    def save(figure: Any, *arguments: Any, **options: Any) -> None:
        seen.append(figure)
        original(figure, *arguments, **options)

    monkeypatch.setattr(figure_class, "savefig", save)

    path = plot_report(full_report(), tmp_path / "new" / "directory")

    assert path == tmp_path / "new" / "directory" / "window.png"
    assert path.read_bytes().startswith(PNG)
    panels = [[label.get_text() for label in axes.get_yticklabels()] for axes in seen[0].axes]
    assert panels[1:] == [
        ["own", "other"],
        ["rows", "peer: rows"],
        ["bytes", "none"],
        ["factor"],
        ["fast (<= 4 ms)", "slow (>= 5x)", "unknown (>= 5 GB/s)"],
    ]
    assert [line.get_label() for line in seen[0].axes[0].lines] == ["a", "b"]
    scales = [axes.get_xscale() for axes in seen[0].axes]
    assert scales == ["log", "log", "linear", "linear", "linear", "linear"]


def test_an_empty_report_is_no_error(tmp_path: Path) -> None:
    """A benchmark that measured one thing draws one thing."""
    pytest.importorskip("matplotlib", reason="matplotlib comes with engram-store[bench]")
    report = Report(bench="b", machine={}, workload={})
    report.targets = [Target.at_most("fast", 4, 2.0)]

    assert plot_report(report, tmp_path / "b.png").read_bytes().startswith(PNG)


def test_without_matplotlib_nothing_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Told at once what to install, before minutes of measuring."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)

    with pytest.raises(SystemExit) as end:
        main(["bench", "window", "--plot", str(tmp_path / "x.png"), "--dir", str(tmp_path / "d")])

    assert end.value.code == 2
    error = capsys.readouterr().err
    assert "--plot needs matplotlib" in error
    assert "engram-store[bench]" in error
    assert not list(tmp_path.iterdir())
    with pytest.raises(PlotError):
        plot_report(full_report(), tmp_path / "x.png")


def test_a_picture_goes_to_a_png_file_or_into_a_directory(tmp_path: Path) -> None:
    """Other formats are refused; a directory may have a dot in its name."""
    dotted = tmp_path / "v1.0"
    dotted.mkdir()

    assert plot_path(tmp_path / "a.png", "ipc") == tmp_path / "a.png"
    assert plot_path(tmp_path, "ipc") == tmp_path / "ipc.png"
    assert plot_path(dotted, "ipc") == dotted / "ipc.png"
    assert plot_path(tmp_path / "later", "ipc") == tmp_path / "later" / "ipc.png"
    with pytest.raises(ConfigError, match=r"ends in \.png, or a directory"):
        plot_path(tmp_path / "a.pdf", "ipc")


def test_a_file_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    """After the measurement, which was printed before."""
    pytest.importorskip("matplotlib", reason="matplotlib comes with engram-store[bench]")
    (tmp_path / "file").write_text("in the way")

    with pytest.raises(PlotError, match="cannot be written"):
        plot_report(full_report(), tmp_path / "file" / "x.png")


def test_lines_that_are_only_references_are_grey() -> None:
    """A line that has a reference of its own is ours, even if others refer to it."""
    report = full_report()
    report.references["rows"] = ("own", "peer: rows")
    colors = [_color(report, timing) for timing in report.timings]

    assert colors[0] == colors[2] != colors[1] == colors[3]


@pytest.mark.parametrize(
    ("value", "text"), [(0.1, "0.1"), (1.0, "1"), (1000.0, "1,000"), (1e7, "10,000,000")]
)
def test_ticks_are_plain_numbers(value: float, text: str) -> None:
    """No powers of ten."""
    assert _tick(value) == text


@pytest.mark.parametrize(
    ("target", "share"),
    [
        (Target.at_most("x", 4, 2.0), 0.5),
        (Target.at_least("x", 4, 2.0, "GB/s"), 2.0),
        (Target.times_faster("x", 4, 8.0), 0.5),
        (Target.times_faster("x", 4, 0.0), float("inf")),
        (Target.at_most("x", 4, None), None),
    ],
)
def test_a_share_above_one_is_a_missed_target(target: Target, share: float | None) -> None:
    """Whether less or more is better."""
    assert target.share == share
    assert target.met is None or share is None or target.met == (share <= 1)
