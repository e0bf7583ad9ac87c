"""What one run trains: plain data, without torch."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from enum import StrEnum
from typing import Any, Self

from benchmarks.shape.errors import ShapeError

BYTES_A_VALUE = 2
"""Rows are bfloat16."""


class Rows(StrEnum):
    """What the gates are given."""

    ABSENT = "absent"
    """No gates, no tables."""
    ZERO = "zero"
    """Gates beside tables whose rows are zero and stay so: the control."""
    TRAINED = "trained"


class Base(StrEnum):
    """What becomes of the base model's own weights."""

    FROZEN = "frozen"
    LORA = "lora"
    FULL = "full"


class Hash(StrEnum):
    """Which published recipe turns tokens into row ids."""

    ENGRAM = "engram"
    ENGRAM_PEFT = "engram-peft"


@dataclass(frozen=True, kw_only=True, slots=True)
class Variant:
    """One point of a study. The defaults are what studies share."""

    rows: Rows = Rows.TRAINED
    base: Base = Base.FROZEN
    hash: Hash = Hash.ENGRAM
    layers: tuple[int, ...] = (1,)
    """Decoder layers of the base, counted from zero, that have a table and a gate."""
    orders: tuple[int, ...] = (2, 3)
    heads: int = 6
    """Hash heads of each order."""
    rows_per_head: int = 20_000
    dim: int = 32
    lr: float = 5e-3
    """Peak, of the gates; tables learn at five times as much."""
    base_lr: float = 0.0
    """Peak, of LoRA's weights or of all weights of the base."""
    lora_rank: int = 16
    steps: int = 150

    @property
    def width(self) -> int:
        """Values that a gate gets for a token."""
        return len(self.orders) * self.heads * self.dim

    @property
    def table_bytes(self) -> int:
        """Of all tables' rows, before each head's rows are rounded up to a prime."""
        if self.rows is not Rows.TRAINED:
            return 0
        return len(self.layers) * self.width * self.rows_per_head * BYTES_A_VALUE

    def control(self) -> Self:
        """The same gates beside rows of zero. Pure.

        Zeros look alike whatever table they come from, so all variants whose gates have the same
        shape share one control.
        """
        default = type(self)()
        columns = len(default.orders) * default.heads
        if self.width % columns:
            raise ShapeError(
                f"a gate of width {self.width} has no control: allowed are multiples of {columns}"
            )
        return replace(
            self,
            rows=Rows.ZERO,
            hash=default.hash,
            orders=default.orders,
            heads=default.heads,
            rows_per_head=default.rows_per_head,
            dim=self.width // columns,
        )

    def __str__(self) -> str:
        """What differs from the defaults, for people."""
        ours, usual = self.to_json(), type(self)().to_json()
        changed = [f"{name}={ours[name]}" for name in ours if ours[name] != usual[name]]
        return ", ".join(changed) or "defaults"

    def to_json(self) -> dict[str, Any]:
        """As JSON types; `from_json` reads it back."""
        lists = {"layers": list(self.layers), "orders": list(self.orders)}
        return {**asdict(self), **lists}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Inverse of `to_json`. Raises: ShapeError for what no variant looks like."""
        try:
            return cls(
                **{
                    **data,
                    "rows": Rows(data["rows"]),
                    "base": Base(data["base"]),
                    "hash": Hash(data["hash"]),
                    "layers": tuple(data["layers"]),
                    "orders": tuple(data["orders"]),
                }
            )
        except (KeyError, TypeError, ValueError) as error:
            known = ", ".join(field.name for field in fields(cls))
            raise ShapeError(f"not a variant ({error}); one has the fields {known}") from error


@dataclass(frozen=True, slots=True)
class Run:
    """A variant at one seed: the unit that is run, recorded and skipped when it is there."""

    variant: Variant
    seed: int
    """Of gates and LoRA at their start, of the hash, and of the order of the text."""
