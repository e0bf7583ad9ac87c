# ruff: noqa: RUF009 - `key` makes a dataclass field
"""The schema of a training run's file. Every key, its default and what it means, in one place.

`--template` prints this, docs/sizing.md lists it, and nothing else is accepted.
"""

from dataclasses import dataclass, field
from typing import Any

from engram_store.errors import ConfigError
from engram_store_client.planning import parse_size
from engram_store_client.planning.models import LINEARS
from engram_store_client.planning.setup import DTYPE_BYTES, MODES, QUANTIZATIONS
from engram_store_client.rates import TABLE_LR_FACTOR


def key(doc: str, default: Any = ..., *, example: Any = None) -> Any:
    """One key of a file.

    Args:
        doc: what it means, in a line or two.
        default: its value where the file has none; without it the key is needed.
        example: what `--template` shows instead of the default.
    """
    metadata = {"doc": doc, "example": example if default is ... else default}
    if example is not None:
        metadata["example"] = example
    if default is ...:
        return field(metadata=metadata)
    if isinstance(default, dict):
        return field(default_factory=lambda: dict(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def _choice(where: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ConfigError(f"{where} is {value!r}; allowed are {', '.join(allowed)}")


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelSettings:
    """The base model."""

    path: str = key(
        "Directory, config.json, or name on the Hugging Face hub.", example="Qwen/Qwen3-4B"
    )
    random_weights: bool = key("Take only its config, and start from random weights.", False)
    dtype: str = key("Of its weights: bfloat16, float16 or float32.", "bfloat16")
    quantization: str = key("Of its matrices, by bitsandbytes: none, 8bit or 4bit.", "none")
    attention: str | None = key("attn_implementation of transformers; null: its choice.", None)
    tokenizer: str | None = key("Directory or name; null: the model's.", None)

    def __post_init__(self) -> None:
        _choice("model.dtype", self.dtype, tuple(DTYPE_BYTES))
        _choice("model.quantization", self.quantization, QUANTIZATIONS)
        if self.random_weights and self.quantization != "none":
            raise ConfigError(
                "model.random_weights makes weights of model.dtype; leave model.quantization out"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class CreateSettings:
    """The store to make where there is none; as the options of `engram-store create`."""

    recipe: str = key("engram, engram-peft, deepseek-v4.1 or qwen3.8-ple.", "engram")
    layers: tuple[int, ...] = key("Model layers that get a table.", example=[1, 9, 17, 25])
    rows_per_head: int = key("Wanted rows of one hash head.", example=1220000)
    heads: int = key("Hash heads of each order.", 8)
    orders: tuple[int, ...] = key("Lengths of n-grams.", (2, 3))
    dim: int = key("Values of a row.", example=64)
    dtype: str = key("Of rows: bfloat16, float16 or float32.", "bfloat16")
    optimizer: str = key("rowwise_adagrad, adagrad, adam or sgd.", "rowwise_adagrad")
    std: float = key("Of normal initial rows; 0: zeros, which take no disk at first.", 0.0)
    pad_id: int | None = key("Id that stands before a text; null: the tokenizer's.", None)


@dataclass(frozen=True, kw_only=True, slots=True)
class StoreSettings:
    """The tables."""

    path: str = key(
        "Directory, or address of a store process (unix:///..., tcp://...).", example="my.engram"
    )
    create: CreateSettings | None = key("What to make where there is no store yet.", None)
    memory: str | None = key("What it may use, such as 16GB; null: what is free.", None)
    options: dict[str, Any] = key(
        "Further options of engram_store_client.connect, such as durability: step.", {}
    )

    def __post_init__(self) -> None:
        if self.memory is not None:
            parse_size(self.memory, "store.memory")


@dataclass(frozen=True, kw_only=True, slots=True)
class MemorySettings:
    """How the model reads the tables, and how they learn."""

    mode: str | None = key(
        "What is trained beside gates and tables: engram_only (nothing), preserve_trainable "
        "(LoRA) or full. null: preserve_trainable with lora, else engram_only.",
        None,
    )
    layers: tuple[int, ...] | None = key("Layers to use; null: all that have a table.", None)
    gate: str | None = key("Which published gate; null: that of the store's recipe.", None)
    dtype: str | None = key("Of the gates; null: the model's.", None)
    identity_init: bool = key("Start as an exact identity, whatever the rows are.", False)
    zero_table: bool = key("The control arm: zeros in place of rows, tables untouched.", False)
    learning_rate_factor: float = key(
        "Tables learn at this multiple of learning_rate.", TABLE_LR_FACTOR
    )

    def __post_init__(self) -> None:
        if self.mode is not None:
            _choice("memory.mode", self.mode, MODES)
        if self.dtype is not None:
            _choice("memory.dtype", self.dtype, tuple(DTYPE_BYTES))


@dataclass(frozen=True, kw_only=True, slots=True)
class LoraSettings:
    """Adapters of the base, by peft."""

    rank: int = key("Rank of every adapter.", 16)
    alpha: int = key("Scale: alpha / rank.", 32)
    dropout: float = key("Of their inputs.", 0.0)
    targets: tuple[str, ...] = key("Matrices of each layer that get one.", LINEARS)

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ConfigError(f"lora.rank is {self.rank}; it is at least 1, or leave lora out")
        for target in self.targets:
            _choice("lora.targets", target, LINEARS)


@dataclass(frozen=True, kw_only=True, slots=True)
class DataSettings:
    """The text."""

    train: tuple[str, ...] = key(
        "Files or patterns (.txt, .md: one text a file; .jsonl: one text a line), or a directory "
        "of datasets.save_to_disk.",
        example=["text/**/*.txt"],
    )
    validation: tuple[str, ...] = key("The same, held out; evaluated if there is any.", ())
    field: str = key("Of .jsonl lines and datasets: where the text is.", "text")
    time: int = key("Tokens of a sequence.", 2048)
    packing: bool = key("Texts one after the other, cut to equal length; false: one a line.", True)

    def __post_init__(self) -> None:
        if not self.train:
            raise ConfigError("data.train names no file; give at least one")
        if self.time < 2:
            raise ConfigError(f"data.time is {self.time}; a sequence has at least 2 tokens")


@dataclass(frozen=True, kw_only=True, slots=True)
class LimitSettings:
    """What may be used. A run that cannot fit is refused before it starts."""

    vram: str | None = key("Such as 24GB; null: of the smallest card.", None)
    memory: str | None = key("Of the host; null: all of it, or the cgroup's limit.", None)
    disk: str | None = key("For tables, snapshots, checkpoints; null: what is free.", None)
    enforce: bool = key("false: say that it does not fit, and start all the same.", True)

    def __post_init__(self) -> None:
        for name in ("vram", "memory", "disk"):
            if getattr(self, name) is not None:
                parse_size(getattr(self, name), f"limits.{name}")


_TRAINING_EXAMPLE = {
    "output_dir": "run",
    "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": 8,
    "gradient_checkpointing": True,
    "learning_rate": 4e-4,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 100,
    "max_steps": 1000,
    "max_grad_norm": 1.0,
    "logging_steps": 10,
    "save_steps": 250,
    "save_total_limit": 2,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class RunSettings:
    """One training run."""

    model: ModelSettings
    store: StoreSettings
    memory: MemorySettings = field(default_factory=MemorySettings)
    lora: LoraSettings | None = key("Adapters of the base, by peft; null: none.", None)
    data: DataSettings
    training: dict[str, Any] = key(
        "Fields of transformers.TrainingArguments, passed on; output_dir is needed.",
        example=_TRAINING_EXAMPLE,
    )
    limits: LimitSettings = field(default_factory=LimitSettings)
    resume: str = key(
        "auto: from the newest complete checkpoint in output_dir, if there is one; never; or a "
        "checkpoint's directory.",
        "auto",
    )
    seed: int = key("Of random weights, LoRA, gates and the order of the data.", 0)

    def __post_init__(self) -> None:
        if not isinstance(self.training.get("output_dir"), str):
            raise ConfigError("training.output_dir is needed: where checkpoints go")
        if self.mode == "full" and self.model.quantization != "none":
            raise ConfigError(
                "memory.mode full cannot train a quantised base; add lora, or set "
                "model.quantization to none"
            )
        if self.lora is not None and self.mode != "preserve_trainable":
            raise ConfigError(
                f"lora is trained by memory.mode preserve_trainable, not {self.mode}; leave one "
                "of the two out"
            )

    @property
    def mode(self) -> str:
        """What is trained beside gates and tables."""
        if self.memory.mode is not None:
            return self.memory.mode
        return "engram_only" if self.lora is None else "preserve_trainable"
