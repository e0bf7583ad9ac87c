"""What one gate is: plain data, without torch."""

import enum
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Self

from engram_store.errors import ConfigError


class GateKind(enum.StrEnum):
    """The published modules that turn looked-up rows into a residual; named as the recipes."""

    ENGRAM = "engram"
    """Engram paper and its official demo."""
    ENGRAM_PEFT = "engram-peft"
    """engram-peft 1.2: the same, branches summed over a single residual stream."""
    DEEPSEEK_V41 = "deepseek-v4.1"
    """DeepSeek-V4.1: folded norm weights, no convolution."""
    QWEN_PLE = "qwen3.8-ple"
    """Qwen3.8-Flash-Next's per-layer embeddings."""


class GateInit(enum.StrEnum):
    """How published models start their gates. Rows start as the store was created."""

    PAPER = "paper"
    """Convolution at zero, projections as torch starts a linear layer: the Engram paper, Megatron,
    TinyEngram; engram-peft together with `identity_init`."""
    DEMO = "demo"
    """The convolution as torch starts one too: the official demo."""
    QWEN_PLE = "qwen3.8-ple"
    """Convolution at zero, projections normal with a deviation of 0.02: transformers' qwen4_exp."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GateConfig:
    """Shapes and options of one layer's gate. Stored in checkpoints."""

    kind: GateKind = GateKind.ENGRAM
    hidden_size: int
    row_width: int
    """Values per token: heads x row dim."""
    streams: int = 1
    """Residual streams of the model (`hc_mult`); engram-peft: branches."""
    bias: bool = False
    """Biases in the key and value projections. The official demo has them, the paper's
    equations do not; the other gates never have."""
    conv: bool = True
    """The short convolution after the gate; only `engram` can leave it out."""
    kernel_size: int = 4
    dilation: int = 3
    """Distance of the convolution's taps in tokens; published: the largest n-gram order."""
    norm_eps: float | None = None
    """Of the key and query norms. None: what the gate's publication uses."""
    init: GateInit = GateInit.PAPER
    """How it starts."""
    identity_init: bool = False
    """Start with a value projection of zero, so that attaching changes no output bit whatever
    the rows. Rows then get their first gradient in the second step; rows that are all zero never
    do. Over all-zero rows a gate is the identity without it, as in the paper."""

    def __post_init__(self) -> None:
        try:
            object.__setattr__(self, "init", GateInit(self.init))
        except ValueError:
            known = ", ".join(GateInit)
            raise ConfigError(f"unknown init {self.init!r}; there are {known}") from None
        for name in ("hidden_size", "row_width", "streams", "kernel_size", "dilation"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.norm_eps is not None and not (math.isfinite(self.norm_eps) and self.norm_eps > 0):
            raise ConfigError(f"norm_eps must be finite and above 0, got {self.norm_eps}")
        if self.kind is not GateKind.ENGRAM and (self.bias or not self.conv):
            raise ConfigError(
                f"bias and conv can only be chosen for the {GateKind.ENGRAM} gate; "
                f"{self.kind} is always as it was published"
            )

    def to_json(self) -> dict[str, Any]:
        """As JSON types; `from_json` reads it back."""
        return {**asdict(self), "kind": str(self.kind), "init": str(self.init)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Inverse of `to_json`. Raises: ConfigError for unknown keys or values."""
        try:
            return cls(**{**data, "kind": GateKind(data["kind"])})
        except (TypeError, KeyError, ValueError, OverflowError) as error:
            raise ConfigError(f"not a gate description: {error}") from error
