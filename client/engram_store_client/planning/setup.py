"""What a training run is, as far as its memory is concerned."""

from collections.abc import Sequence
from dataclasses import dataclass

from engram_store.errors import ConfigError
from engram_store_client.planning.models import LINEARS, ModelShape
from engram_store_client.planning.tables import TableShape

MODES = ("engram_only", "preserve_trainable", "full")
DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
QUANTIZATIONS = ("none", "8bit", "4bit")
OPTIMIZERS = ("adamw", "adamw_8bit", "sgd")
DEVICES = ("cuda", "cpu")


@dataclass(frozen=True, kw_only=True, slots=True)
class Setup:
    """One training run on one device. Pure data; `make_plan` says what it takes."""

    model: ModelShape
    tables: TableShape
    mode: str = "engram_only"
    """As for `attach`: what is trained beside gates and tables. `preserve_trainable` trains what
    LoRA made trainable."""
    lora_rank: int = 0
    """0: no LoRA."""
    lora_targets: tuple[str, ...] = LINEARS
    """Matrices of a layer that get LoRA."""
    batch: int = 1
    """Sequences of one micro-batch."""
    time: int = 2048
    """Tokens of a sequence."""
    accumulate: int = 1
    """Micro-batches of one step."""
    dtype: str = "bfloat16"
    """Of the base's weights and of its arithmetic."""
    quantization: str = "none"
    """Of the base's matrices, by bitsandbytes: 8bit (LLM.int8), 4bit (NF4)."""
    gate: str | None = None
    """None: the one that was published with the recipe."""
    gate_dtype: str | None = None
    """None: `dtype`."""
    lora_dtype: str | None = None
    """None: float32, as PEFT makes it for a base of half precision."""
    streams: int = 1
    """Residual streams of the gates."""
    checkpointing: bool = False
    """Gradient checkpointing: a layer's activations are computed again for its backward pass."""
    autocast: bool = False
    """Mixed precision over float32 weights."""
    optimizer: str = "adamw"
    """Of everything but the tables."""
    look_ahead: int = 2
    """Windows announced ahead of the one that is trained."""
    steps: int | None = None
    """How many are trained, which bounds what comes onto the disk; None: any number."""
    snapshots: int = 3
    """Snapshots of the store that are kept."""
    checkpoints: int = 2
    """Checkpoints of the trainer that are kept."""
    device: str = "cuda"

    def __post_init__(self) -> None:
        _check_choice("mode", self.mode, MODES)
        _check_choice("dtype", self.dtype, tuple(DTYPE_BYTES))
        _check_choice("quantization", self.quantization, QUANTIZATIONS)
        _check_choice("optimizer", self.optimizer, OPTIMIZERS)
        _check_choice("device", self.device, DEVICES)
        for name in ("gate_dtype", "lora_dtype"):
            if getattr(self, name) is not None:
                _check_choice(name, getattr(self, name), tuple(DTYPE_BYTES))
        for target in self.lora_targets:
            _check_choice("lora target", target, LINEARS)
        for name in ("batch", "time", "accumulate", "streams"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it is at least 1")
        for name in ("lora_rank", "look_ahead", "snapshots", "checkpoints"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} is {getattr(self, name)}; it is at least 0")
        if self.steps is not None and self.steps < 1:
            raise ConfigError(f"steps is {self.steps}; it is at least 1")
        self._check_together()

    def _check_together(self) -> None:
        """Raises: ConfigError."""
        if self.mode == "full" and self.quantization != "none":
            raise ConfigError(
                "a quantised base cannot be trained in mode full; train it by LoRA (mode "
                "preserve_trainable with a rank), or leave quantization out"
            )
        if self.mode == "engram_only" and self.lora_rank:
            raise ConfigError(
                "mode engram_only trains no LoRA; take mode preserve_trainable, or rank 0"
            )
        outside = [spec.layer for spec in self.tables.specs if spec.layer >= self.model.layers]
        if outside and self.tables.recipe != "qwen3.8-ple":
            raise ConfigError(
                f"tables are for layers {outside}; the model has layers 0 to "
                f"{self.model.layers - 1}"
            )

    @property
    def tokens(self) -> int:
        """Tokens of one micro-batch."""
        return self.batch * self.time

    @property
    def weight_bytes(self) -> int:
        """Bytes of one value of the base."""
        return DTYPE_BYTES[self.dtype]

    @property
    def gate_bytes(self) -> int:
        """Bytes of one value of the gates."""
        return DTYPE_BYTES[self.gate_dtype or self.dtype]

    @property
    def lora_bytes(self) -> int:
        """Bytes of one value of LoRA."""
        return DTYPE_BYTES[self.lora_dtype or "float32"]

    @property
    def gate_kind(self) -> str:
        """Name of the published module; gates are named as their recipes."""
        return self.gate or self.tables.recipe

    @property
    def kernel_dilation(self) -> tuple[int, int]:
        """Of the gates' convolution, as `attach` makes it."""
        return 4, max(self.tables.orders)


def _check_choice(name: str, value: str, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise ConfigError(f"{name} is {value!r}; allowed are {', '.join(allowed)}")
