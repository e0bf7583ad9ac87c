"""The pictures of docs/results.md, drawn from the same records as its tables."""

import hashlib
import importlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.shape.errors import ShapeError
from benchmarks.shape.plan import DEFAULT, SEEDS, UNTOUCHED, Study, study
from benchmarks.shape.records import Records
from benchmarks.shape.variants import Base, Rows, Variant

NAMES = ("shape_layers", "shape_tables", "shape_forgetting")
_COLORS = ("#1f6fb4", "#c03d3e", "#3a923a", "#8e6bb0", "#b3b3b3", "#e08214")
_DOTS_PER_INCH = 120


@dataclass(frozen=True, slots=True)
class Curve:
    """Points of one colour; `ys` has the values of each point's seeds."""

    label: str
    xs: tuple[float, ...]
    ys: tuple[tuple[float, ...], ...]
    names: tuple[str, ...] = ()
    """Written beside the points."""
    line: bool = True


@dataclass(frozen=True, slots=True)
class Panel:
    """One pair of axes."""

    title: str
    x: str
    y: str
    curves: tuple[Curve, ...]
    log_x: bool = False
    ticks: tuple[str, ...] = ()
    """Names of x = 0, 1, ..."""


def picture(name: str, records: Records) -> tuple[Panel, ...]:
    """What a picture shows. Pure. Points that were not run are left out."""
    if name == "shape_layers":
        return (_layers(records),)
    if name == "shape_tables":
        return (
            _size(records),
            *(_bars(study(each), records) for each in ("heads", "orders", "dimension", "hash")),
        )
    return (_forgetting(records), _adaptation(study("adaptation"), records))


def fingerprint(panels: Sequence[Panel]) -> str:
    """Of everything that a picture shows; written into its file."""
    text = json.dumps([asdict(panel) for panel in panels], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def draw_plots(records: Records, directory: Path) -> list[Path]:
    """Draw all pictures.

    Returns:
        Their files, `NAME.png`.

    Raises:
        ShapeError: matplotlib is not installed.
    """
    directory.mkdir(parents=True, exist_ok=True)
    return [_draw(picture(name, records), directory / f"{name}.png") for name in NAMES]


def _prose(records: Records, variant: Variant) -> tuple[float, ...]:
    return tuple(records.perplexities(variant, "prose", SEEDS))


def _curve(
    label: str, records: Records, points: Sequence[tuple[float, Variant]], **options: Any
) -> Curve:
    found = [(x, _prose(records, variant)) for x, variant in points]
    kept = [(x, values) for x, values in found if values]
    return Curve(label, tuple(x for x, _ in kept), tuple(values for _, values in kept), **options)


def _layers(records: Records) -> Panel:
    single = [row.variant for row in study("layers").rows if len(row.variant.layers) == 1]
    trained = [(float(variant.layers[0]), variant) for variant in single]
    zero = [(x, variant.control()) for x, variant in trained]
    return Panel(
        "One table of 15 MB at one layer of eight",
        "layer",
        "perplexity, prose",
        (_curve("zero table", records, zero), _curve("Engram", records, trained)),
    )


def _size(records: Records) -> Panel:
    variants = [row.variant for row in study("size").rows]
    points = [(float(variant.rows_per_head), variant) for variant in variants]
    ends = (points[0], points[-1])
    zero = [(x, variant.control()) for x, variant in ends]
    return Panel(
        "Table size",
        "rows of a head",
        "perplexity, prose",
        (_curve("zero table", records, zero), _curve("Engram", records, points)),
        log_x=True,
    )


def _bars(each: Study, records: Records) -> Panel:
    """Points side by side, in the order of the study's lines."""
    points = [(float(place), row.variant) for place, row in enumerate(each.rows)]
    zero = [(x, variant.control()) for x, variant in points]
    return Panel(
        each.title,
        "",
        "perplexity, prose",
        (
            _curve("zero table", records, zero, line=False),
            _curve("Engram", records, points, line=False),
        ),
        ticks=tuple(row.label.replace(", ", ",\n").replace(" (", "\n(") for row in each.rows),
    )


def _adaptation(each: Study, records: Records) -> Panel:
    points = [(float(place), row.variant) for place, row in enumerate(each.rows)]
    return Panel(
        each.title,
        "",
        "perplexity, prose",
        (_curve("", records, points, line=False),),
        ticks=tuple(row.label.replace(" ", "\n") for row in each.rows),
    )


def _forgetting(records: Records) -> Panel:
    """Both domains, one point per learning rate: down is learned, left is not forgotten."""
    curves = []
    groups: dict[str, Callable[[Variant], bool]] = {
        "zero table": lambda v: v.rows is Rows.ZERO,
        "Engram": lambda v: v.rows is Rows.TRAINED,
        "LoRA": lambda v: v.base is Base.LORA,
        "full fine-tuning": lambda v: v.base is Base.FULL,
    }
    variants = [row.variant for row in study("rates").rows]
    for label, belongs in groups.items():
        curves.append(_frontier(label, records, [v for v in variants if belongs(v)]))
    both = [r.variant for r in study("adaptation").rows if r.variant.rows is Rows.TRAINED]
    together = [v for v in both if v != DEFAULT]
    curves.append(_frontier("LoRA, full + Engram", records, together, line=False))
    four = [row.variant for row in study("layers").rows if len(row.variant.layers) > 1]
    curves.append(_frontier("Engram in four layers", records, four, line=False))
    curves.append(_frontier("base, as it was", records, [UNTOUCHED], line=False))
    return Panel(
        "What is learned and what is forgotten, one point per learning rate",
        "perplexity, code (the base's own domain)",
        "perplexity, prose",
        tuple(curves),
    )


def _frontier(
    label: str, records: Records, variants: Sequence[Variant], *, line: bool = True
) -> Curve:
    """Points at (code, prose), means of the seeds."""
    xs, ys, names = [], [], []
    for variant in variants:
        code = records.perplexities(variant, "code", SEEDS)
        prose = _prose(records, variant)
        if code:
            xs.append(sum(code) / len(code))
            ys.append((sum(prose) / len(prose),))
            names.append(f"{variant.base_lr or variant.lr:g}" if line else "")
    return Curve(label, tuple(xs), tuple(ys), tuple(names), line)


def _draw(panels: Sequence[Panel], path: Path) -> Path:
    try:
        figures = importlib.import_module("matplotlib.figure")
    except ImportError as error:
        raise ShapeError(
            f"plots need matplotlib, which cannot be imported ({error}); install it with "
            "`pip install 'engram-store[bench]'`"
        ) from error
    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    figure = figures.Figure(figsize=(6.4 * columns, 4.2 * rows), layout="constrained")
    every = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes, panel in zip(every, panels, strict=False):
        _draw_panel(axes, panel)
    for axes in every[len(panels) :]:
        axes.remove()
    figure.savefig(
        path, dpi=_DOTS_PER_INCH, metadata={"Description": fingerprint(panels), "Software": None}
    )
    return path


def _draw_panel(axes: Any, panel: Panel) -> None:
    for color, curve in zip((*_COLORS, "black"), panel.curves, strict=False):
        means = [sum(values) / len(values) for values in curve.ys]
        style = "-" if curve.line and len(means) > 1 else ""
        axes.plot(curve.xs, means, style + "o", color=color, label=curve.label or None)
        for x, values in zip(curve.xs, curve.ys, strict=True):
            axes.plot([x] * len(values), values, "_", color=color, markersize=11)
        for x, y, name in zip(curve.xs, means, curve.names, strict=False):
            axes.annotate(name, (x, y), xytext=(4, 4), textcoords="offset points", fontsize=7)
    axes.set(title=panel.title, xlabel=panel.x, ylabel=panel.y)
    axes.title.set_fontsize(10)
    if panel.log_x:
        axes.set_xscale("log")
    if panel.ticks:
        axes.set_xticks(range(len(panel.ticks)), panel.ticks, fontsize=7)
    axes.grid(visible=True, alpha=0.3)
    if any(curve.label for curve in panel.curves):
        axes.legend(fontsize=8)
