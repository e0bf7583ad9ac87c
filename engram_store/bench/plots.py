"""A report as one picture: bars of medians beside their references, curves, and the targets."""

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engram_store.bench.harness import Quantity, Report, Series, Target, Timing
from engram_store.errors import ConfigError

_SUFFIX = ".png"
_OWN, _OTHER, _MET, _MISSED = "#1f6fb4", "#b3b3b3", "#3a923a", "#c03d3e"
_WIDTH = 9.0
"""Inches."""
_BAR, _PANEL, _CURVES = 0.27, 0.8, 3.2
"""Inches: of a bar, of a panel's title and axis, of a panel of curves."""
_BEHIND_TEXT = {"facecolor": "white", "edgecolor": "none", "pad": 0.8}
_LOGARITHMIC = 12.0
"""An axis is logarithmic when its largest value is so many times its smallest."""
_DOTS_PER_INCH = 130


class PlotError(ConfigError):
    """A picture was asked for that cannot be drawn here."""


@dataclass(frozen=True, slots=True)
class _Panel:
    """One part of the picture."""

    inches: float
    draw: Callable[[Any], None]


@dataclass(frozen=True, slots=True)
class _Bar:
    name: str
    value: float
    color: str
    text: str
    most: float | None = None
    """Where a thin line ends that starts at `value`."""


def plot_path(target: Path, bench: str) -> Path:
    """The file a report is drawn to: `target`, or in it when it is a directory.

    Raises:
        ConfigError: neither a PNG file nor a directory.
    """
    if target.suffix.lower() == _SUFFIX and not target.is_dir():
        return target
    if target.is_dir() or not target.suffix:
        return target / f"{bench}{_SUFFIX}"
    raise ConfigError(f"--plot is {target}; give a file that ends in {_SUFFIX}, or a directory")


def require_matplotlib() -> None:
    """For whoever is about to measure for minutes.

    Raises:
        PlotError: matplotlib is not installed.
    """
    _matplotlib("matplotlib")


def plot_report(report: Report, target: Path) -> Path:
    """Draw a report.

    Args:
        report: what was measured.
        target: a PNG file, or a directory for a file named after the benchmark.

    Returns:
        The file.

    Raises:
        ConfigError: `target` is neither.
        PlotError: matplotlib is not installed, or the file cannot be written.
    """
    require_matplotlib()
    path = plot_path(target, report.bench)
    panels = _panels(report)
    figures = _matplotlib("matplotlib.figure")
    head = 0.75
    height = head + sum(panel.inches for panel in panels)
    figure = figures.Figure(figsize=(_WIDTH, height), layout="constrained")
    grid = figure.subplots(
        len(panels), 1, squeeze=False, height_ratios=[panel.inches for panel in panels]
    )
    for axes, panel in zip(grid[:, 0], panels, strict=True):
        panel.draw(axes)
    figure.suptitle(_title(report), fontsize=9, x=0.01, ha="left")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=_DOTS_PER_INCH)
    except OSError as error:
        raise PlotError(f"{path} cannot be written: {error}; choose another place") from error
    return path


def _matplotlib(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise PlotError(
            f"--plot needs matplotlib, which cannot be imported ({error}); install it with "
            "`pip install 'engram-store[bench]'`, or leave --plot out"
        ) from error


def _title(report: Report) -> str:
    work, machine = report.workload, report.machine
    parts = [f"{name} {work[key]:,}" for name, key in _SIZES.items() if key in work]
    made = (machine.get("date"), machine.get("revision"), machine.get("cpu"))
    return (
        f"engram-store bench {report.bench}: {', '.join(parts)}\n"
        f"{', '.join(str(part) for part in made if part)}"
    )


_SIZES = {
    "rows": "table_rows",
    "tokens a step": "tokens",
    "look-ups": "lookups_per_step",
    "unique rows": "unique_rows_per_step",
}


def _panels(report: Report) -> list[_Panel]:
    whole = [timing for timing in report.timings if timing.rows is None]
    by_row = [timing for timing in report.timings if timing.rows is not None]
    panels = _series_panels(report.series)
    if whole:
        panels.append(_bars("median ms (thin: to the 95th percentile)", _timings(report, whole)))
    if by_row:
        bars = [_row_bar(report, timing) for timing in by_row]
        panels.append(_bars("ns a row, beside other software", bars))
    for unit in dict.fromkeys(quantity.unit for quantity in report.quantities):
        panels.append(_bars(unit, [_amount(q) for q in report.quantities if q.unit == unit]))
    if report.targets:
        panels.append(_targets(report.targets))
    return panels


def _timings(report: Report, timings: Sequence[Timing]) -> list[_Bar]:
    return [
        _Bar(
            timing.name,
            timing.median_ms,
            _color(report, timing),
            _number(timing.median_ms),
            timing.p95_ms,
        )
        for timing in timings
    ]


def _row_bar(report: Report, timing: Timing) -> _Bar:
    assert timing.ns_per_row is not None
    return _Bar(timing.name, timing.ns_per_row, _color(report, timing), _number(timing.ns_per_row))


def _color(report: Report, timing: Timing) -> str:
    """Grey: it is only there so that others are compared with it."""
    only_reference = timing.name not in report.references and any(
        timing.name in names for names in report.references.values()
    )
    return _OTHER if only_reference else _OWN


def _amount(quantity: Quantity) -> _Bar:
    most = float(quantity.samples.max()) if quantity.samples.size > 1 else None
    return _Bar(quantity.name, quantity.median, _OWN, _number(quantity.median), most)


def _bars(label: str, bars: Sequence[_Bar], *, linear: bool = False) -> _Panel:
    def draw(axes: Any) -> None:
        places = range(len(bars))
        values = [bar.value for bar in bars]
        axes.barh(places, values, color=[bar.color for bar in bars], height=0.72)
        for place, bar in zip(places, bars, strict=True):
            end = max(bar.value, bar.most or bar.value)
            axes.plot([bar.value, end], [place, place], color="#444444", linewidth=0.8)
            axes.annotate(
                bar.text,
                (end, place),
                (4, 0),
                textcoords="offset points",
                va="center",
                fontsize=8,
                bbox=_BEHIND_TEXT,
            )
        axes.set_yticks(places, [bar.name for bar in bars], fontsize=8)
        axes.set_xlabel(label, fontsize=8)
        if not linear:
            _scale(axes, values)
        axes.margins(x=0.12)
        axes.set_ylim(len(bars) - 0.1, -0.9)  # the first on top, few bars as thick as many
        _quiet(axes)

    return _Panel(_PANEL + _BAR * len(bars), draw)


def _series_panels(series: Sequence[Series]) -> list[_Panel]:
    together: dict[tuple[str, str], list[Series]] = {}
    for one in series:
        together.setdefault((one.x_label, one.y_label), []).append(one)
    return [_curves(curves) for curves in together.values()]


def _curves(curves: Sequence[Series]) -> _Panel:
    def draw(axes: Any) -> None:
        for curve in curves:
            axes.plot(curve.x, curve.y, marker="o", markersize=4, label=curve.name)
        axes.set_ylim(bottom=0)
        axes.set_xlabel(curves[0].x_label, fontsize=8)
        _scale(axes, [x for curve in curves for x in curve.x])
        axes.set_ylabel(curves[0].y_label, fontsize=8)
        axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
        _quiet(axes)

    return _Panel(_CURVES, draw)


def _targets(targets: Sequence[Target]) -> _Panel:
    """How much of its limit each one uses; a missed one reaches beyond the line."""
    bars = []
    for target in targets:
        words = f"{target.what} ({target.target})"
        if target.share is None or target.measured is None:
            bars.append(_Bar(words, 0, _OTHER, "not measured"))
            continue
        mark = "met" if target.met else "missed"
        color = _MET if target.met else _MISSED
        bars.append(_Bar(words, target.share, color, f"{_number(target.measured)}, {mark}"))
    panel = _bars("of the target: left of the line is better than promised", bars, linear=True)

    def draw(axes: Any) -> None:
        panel.draw(axes)
        axes.set_xlim(0, max([1.4, *(1.25 * bar.value for bar in bars)]))
        axes.axvline(1, color="#222222", linewidth=1.2)

    return _Panel(panel.inches, draw)


def _scale(axes: Any, values: Sequence[float]) -> None:
    """A logarithmic axis where small values would vanish beside large ones."""
    positive = [value for value in values if value > 0]
    if positive and max(positive) > _LOGARITHMIC * min(positive):
        axes.set_xscale("log")
        axes.set_xlabel(f"{axes.get_xlabel()}, logarithmic")
        axes.xaxis.set_major_formatter(_tick)


def _tick(value: float, _position: int | None = None) -> str:
    return f"{value:,.0f}" if value >= 1 else f"{value:g}"


def _quiet(axes: Any) -> None:
    """Nothing that draws the eye away from the bars."""
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.tick_params(labelsize=8)
    axes.grid(axis="x", color="#e4e4e4", linewidth=0.6)
    axes.set_axisbelow(True)


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
