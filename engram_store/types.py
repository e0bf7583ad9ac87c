"""Array aliases and the description of one table."""

import enum
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from types import NoneType
from typing import Any, Self, TypeAlias

import numpy as np
from numpy.typing import NDArray

from engram_store.errors import ConfigError

TokenIds: TypeAlias = NDArray[np.int64]
"""Raw token ids, [batch, time]."""
RowIds: TypeAlias = NDArray[np.int32]
"""Row ids of one table; a table has fewer than 2^31 rows."""
Inverse: TypeAlias = NDArray[np.int32]
"""For every look-up of a window, its position among the window's unique rows."""
RowBlock: TypeAlias = NDArray[Any]
"""Rows [n, dim] in the table's storage dtype (see `RowDtype.storage`)."""
GradientBlock: TypeAlias = NDArray[Any]
"""Gradients [n, dim]: float32, or uint16 holding the bits of bfloat16."""


class RowDtype(enum.StrEnum):
    """The number format of a table's rows."""

    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"
    FLOAT32 = "float32"

    @property
    def storage(self) -> np.dtype[Any]:
        """The numpy dtype that holds a value: numpy has no bfloat16, so its bits are uint16."""
        return np.dtype({"bfloat16": "<u2", "float16": "<f2", "float32": "<f4"}[self.value])


class OptimizerKind(enum.StrEnum):
    """How gradients change rows; it also decides what state a row has."""

    SGD = "sgd"
    ROWWISE_ADAGRAD = "rowwise_adagrad"
    ADAGRAD = "adagrad"
    ADAM = "adam"


class NonFinitePolicy(enum.StrEnum):
    """What happens to NaN and infinity in a gradient."""

    REJECT = "reject"
    """Refuse the push (`NonFiniteGradientError`)."""
    SKIP = "skip"
    """Leave the rows they belong to alone in this step, and count them."""
    ACCEPT = "accept"
    """Take them as they are."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TableSpec:
    """What one table is. Decides stored bytes, so it is stored with the table."""

    layer: int
    """Number of the model layer that reads the table."""
    rows: int
    """Rows that can be addressed."""
    dim: int
    """Values of a row."""
    dtype: RowDtype = RowDtype.BFLOAT16
    optimizer: OptimizerKind = OptimizerKind.ROWWISE_ADAGRAD
    stochastic_rounding: bool = True
    """Round bfloat16 rows up or down at random, so that small updates count on average."""
    on_nonfinite: NonFinitePolicy = NonFinitePolicy.REJECT
    seed: int = 0
    """Seed of stochastic rounding."""
    chunk_rows: int | None = None
    """Rows of a base chunk, a power of two; chosen when the store is created."""

    def __post_init__(self) -> None:
        if self.dim < 1:
            raise ConfigError(f"dim must be at least 1, got {self.dim}")
        if not 1 <= self.rows < 2**31 - 2**20:
            raise ConfigError(
                f"a table has 1 to {2**31 - 2**20 - 1:,} rows, got {self.rows:,} for layer "
                f"{self.layer}; use fewer rows per head"
            )
        chunk = self.chunk_rows
        if chunk is not None and (chunk < 1 or chunk & (chunk - 1)):
            raise ConfigError(f"chunk_rows must be a power of two, got {chunk}")

    @property
    def name(self) -> str:
        """How messages and statistics call the table."""
        return f"layer {self.layer}"

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return self.dim * self.dtype.storage.itemsize

    @property
    def state_name(self) -> str | None:
        """What the optimiser keeps beside each row: None (sgd), 'sum' or 'moments'."""
        return {"sgd": None, "adam": "moments"}.get(self.optimizer.value, "sum")

    @property
    def state_width(self) -> int:
        """float32 values of optimiser state per row."""
        widths = {"sgd": 0, "rowwise_adagrad": 1, "adagrad": self.dim, "adam": 2 * self.dim}
        return widths[self.optimizer.value]

    @property
    def state_bytes(self) -> int:
        """Bytes of optimiser state per row."""
        return 4 * self.state_width

    def to_json(self) -> dict[str, Any]:
        """As JSON types; `from_json` reads it back."""
        return {k: str(v) if isinstance(v, enum.Enum) else v for k, v in asdict(self).items()}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Inverse of `to_json`.

        Raises:
            ConfigError: not an object, unknown or missing keys, or values of another type: 4.0
            and true are no whole numbers.
        """
        try:
            values = {**data}
            for key, kind in _ENUMS.items():
                values[key] = kind(values[key])
            for key in values.keys() & _WHOLE_NUMBERS:
                if type(values[key]) is not int:
                    raise TypeError(f"{key} is {values[key]!r:.100}, not a whole number")
            if type(values.get("chunk_rows")) not in (int, NoneType):
                raise TypeError(f"chunk_rows is {values['chunk_rows']!r:.100}, not a whole number")
            if not isinstance(values.get("stochastic_rounding", True), bool):
                raise TypeError(
                    f"stochastic_rounding is {values['stochastic_rounding']!r:.100}, not true or "
                    "false"
                )
            return cls(**values)
        except (TypeError, KeyError, ValueError) as error:
            raise ConfigError(f"not a table description: {error}") from error


_ENUMS: Mapping[str, type[enum.StrEnum]] = {
    "dtype": RowDtype,
    "optimizer": OptimizerKind,
    "on_nonfinite": NonFinitePolicy,
}
_WHOLE_NUMBERS = frozenset({"layer", "rows", "dim", "seed"})


@dataclass(frozen=True, kw_only=True, slots=True)
class HyperParameters:
    """What a commit tells the optimisers. Unused ones are ignored by the others.

    Defaults are torch's (`SparseAdam`, `Adagrad`), except `eps` of None, which means
    1e-8 for Adam and row-wise Adagrad and 1e-10 for Adagrad, as there.
    """

    lr: float
    eps: float | None = None
    beta1: float = 0.9
    beta2: float = 0.999
    gradient_scale: float = field(default=1.0)
    """Every summed gradient is multiplied by it first: clipping, averaging, unscaling."""

    def __post_init__(self) -> None:
        for name in ("lr", "beta1", "beta2", "gradient_scale"):
            value = getattr(self, name)
            if not np.isfinite(value) or value < 0:
                raise ConfigError(f"{name} must be finite and not negative, got {value}")
        if self.beta1 >= 1 or self.beta2 >= 1:
            raise ConfigError(f"betas must be below 1, got {self.beta1} and {self.beta2}")
        if self.eps is not None and not (np.isfinite(self.eps) and self.eps >= 0):
            raise ConfigError(f"eps must be finite and not negative, got {self.eps}")


@dataclass(frozen=True, slots=True)
class Durability:
    """When applied steps outlive the host."""

    journaled: bool
    """False: with the next snapshot."""
    group_seconds: float = 0.0
    """0: before commit returns; otherwise so long after it."""

    @classmethod
    def parse(cls, text: str) -> "Durability":
        """`snapshot`, `step`, or `group(20)`, in milliseconds. Raises: ConfigError."""
        if text in ("snapshot", "step"):
            return cls(journaled=text == "step")
        number = text.removeprefix("group(").removesuffix(")")
        if text == f"group({number})" and number.isdecimal() and 1 <= int(number) <= 60_000:
            return cls(journaled=True, group_seconds=int(number) / 1000)
        raise ConfigError(
            f"durability is {text!r}; allowed are 'snapshot', 'step' and 'group(MS)' with 1 to "
            "60000 milliseconds, such as 'group(50)'"
        )
