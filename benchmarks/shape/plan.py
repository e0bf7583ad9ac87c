"""The studies: which variants are compared with which, as data."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from benchmarks.shape.errors import ShapeError
from benchmarks.shape.variants import Base, Hash, Rows, Run, Variant

SEEDS = (0, 1)

DEFAULT = Variant()
"""One early layer with a table of 15 MB."""
UNTOUCHED = Variant(rows=Rows.ABSENT)
"""The base as it is."""
LORA_LR = 5e-3
FULL_LR = 1e-3
"""The best of the study `rates`."""


@dataclass(frozen=True, slots=True)
class Row:
    """One line of a study's table."""

    label: str
    variant: Variant
    reference: Variant | None = None
    """What it is judged against; None: it is what others are judged against."""


@dataclass(frozen=True, slots=True)
class Study:
    """One question."""

    name: str
    title: str
    rows: tuple[Row, ...]
    controlled: bool = True
    """Whether the table shows each line's zero-table control."""

    def variants(self) -> Iterator[Variant]:
        """Everything that has to be run for it, controls first."""
        for row in self.rows:
            if self.controlled and row.variant.rows is Rows.TRAINED:
                yield row.variant.control()
            yield row.variant


def _study(
    name: str, title: str, reference: str, points: dict[str, Variant], *, controlled: bool = True
) -> Study:
    """A study whose lines are all judged against one of them."""
    rows = (
        Row(label, variant, None if label == reference else points[reference])
        for label, variant in points.items()
    )
    return Study(name, title, tuple(rows), controlled)


def _with(**changes: Any) -> Variant:
    return replace(DEFAULT, **changes)


def _adapted(base: Base, rows: Rows, lr: float) -> Variant:
    return _with(base=base, rows=rows, base_lr=lr)


_ZERO = DEFAULT.control()
_LONGER = _with(steps=450)
_LAGGED = _with(hash=Hash.ENGRAM_PEFT)
_LORA = {rows: _adapted(Base.LORA, rows, LORA_LR) for rows in Rows}
_FULL = {rows: _adapted(Base.FULL, rows, FULL_LR) for rows in Rows}

_ADAPTATION = Study(
    "adaptation",
    "LoRA, Engram, both, and full fine-tuning",
    (
        Row("base, as it was", UNTOUCHED),
        Row("zero table", _ZERO, UNTOUCHED),
        Row("Engram", DEFAULT, _ZERO),
        Row("LoRA, rank 5", replace(_LORA[Rows.ABSENT], lora_rank=5), DEFAULT),
        Row("LoRA, rank 16", _LORA[Rows.ABSENT], DEFAULT),
        Row("LoRA + zero table", _LORA[Rows.ZERO], _LORA[Rows.ABSENT]),
        Row("LoRA + Engram", _LORA[Rows.TRAINED], _LORA[Rows.ZERO]),
        Row("full fine-tuning", _FULL[Rows.ABSENT], DEFAULT),
        Row("full + zero table", _FULL[Rows.ZERO], _FULL[Rows.ABSENT]),
        Row("full + Engram", _FULL[Rows.TRAINED], _FULL[Rows.ZERO]),
    ),
    controlled=False,  # the controls are lines of their own
)

STUDIES = (
    _ADAPTATION,
    _study(
        "layers",
        "Early against late layers",
        "layer 1",
        {f"layer {n}": _with(layers=(n,)) for n in (0, 1, 3, 7)}
        | {"layers 1, 3, 5, 7": _with(layers=(1, 3, 5, 7))},
    ),
    Study(
        "hash",
        "Recipe A against engram-peft's lagged windows",
        (
            Row("recipe A (official), layer 1", DEFAULT),
            Row("recipe P (engram-peft), layer 1", _LAGGED, DEFAULT),
            Row("recipe A (official), layer 7", _with(layers=(7,)), DEFAULT),
            Row("recipe P (engram-peft), layer 7", replace(_LAGGED, layers=(7,)), _LAGGED),
        ),
    ),
    _study(
        "size",
        "Table size",
        "20,000 rows a head",
        {f"{n:,} rows a head": _with(rows_per_head=n) for n in (1_000, 4_000, 20_000, 100_000)},
    ),
    _study(
        "heads",
        "Heads, at equal bytes and equal width",
        "6 heads x 32",
        {
            f"{n} head{'s' * (n > 1)} x {192 // n}": _with(heads=n, dim=192 // n)
            for n in (1, 3, 6, 12)
        },
    ),
    _study(
        "orders",
        "N-gram orders, at equal bytes and equal width",
        "2 + 3",
        {
            "2": _with(orders=(2,), heads=12),
            "2 + 3": DEFAULT,
            "2 + 3 + 4": _with(orders=(2, 3, 4), heads=4),
        },
    ),
    _study(
        "dimension",
        "Dimension",
        "32 dims, 20,000 rows a head",
        {
            "32 dims, 20,000 rows a head": DEFAULT,
            "8 dims, 20,000 rows a head": _with(dim=8),
            "8 dims, 80,000 rows a head (equal bytes)": _with(dim=8, rows_per_head=80_000),
            "128 dims, 5,000 rows a head (equal bytes)": _with(dim=128, rows_per_head=5_000),
        },
    ),
    Study(
        "steps",
        "Three times as much text",
        (
            Row("zero table, 150 steps", _ZERO),
            Row("zero table, 450 steps", replace(_ZERO, steps=450), _ZERO),
            Row("Engram, 150 steps", DEFAULT),
            Row("Engram, 450 steps", _LONGER, DEFAULT),
            Row("LoRA, 150 steps", _LORA[Rows.ABSENT], DEFAULT),
            Row("LoRA, 450 steps", replace(_LORA[Rows.ABSENT], steps=450), _LONGER),
        ),
        controlled=False,
    ),
    Study(
        "rates",
        "Learning rates",
        tuple(
            Row(f"{label}, {lr:g}", variant)
            for label, variants in {
                "LoRA": [_adapted(Base.LORA, Rows.ABSENT, lr) for lr in (5e-4, 2e-3, 5e-3, 1e-2)],
                "full": [_adapted(Base.FULL, Rows.ABSENT, lr) for lr in (5e-4, 1e-3, 2e-3)],
                "Engram": [_with(lr=lr) for lr in (2.5e-3, 5e-3, 1e-2, 2e-2)],
                "zero table": [replace(_ZERO, lr=lr) for lr in (5e-3, 1e-2, 2e-2)],
            }.items()
            for variant in variants
            for lr in [variant.base_lr or variant.lr]
        ),
        controlled=False,
    ),
)


def study(name: str) -> Study:
    """One study. Raises: ShapeError."""
    named = {each.name: each for each in STUDIES}
    if name not in named:
        raise ShapeError(f"there is no study {name!r}; there are {sorted(named)}")
    return named[name]


def planned_runs(studies: tuple[Study, ...] = STUDIES) -> list[Run]:
    """Every run once, in the order of the studies; both seeds of a variant one after the other."""
    variants = dict.fromkeys(variant for each in studies for variant in each.variants())
    return [Run(variant, seed) for variant in variants for seed in SEEDS]
