"""What a run's file takes: its settings as the planner's."""

from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engram_store.errors import ConfigError
from engram_store_client.planning import (
    Limits,
    Plan,
    Setup,
    TableShape,
    make_plan,
    parse_size,
    read_model,
)
from engram_store_client.planning.models import LINEARS
from engram_store_client.runs.reading import refuse_unknown
from engram_store_client.runs.settings import LimitSettings, RunSettings

if TYPE_CHECKING:
    from transformers import TrainingArguments

_CHECKPOINTING = "activation_checkpointing"
"""What transformers 5.23 calls gradient_checkpointing."""


def training_arguments(settings: RunSettings) -> "TrainingArguments":
    """The Trainer's arguments. Raises: ConfigError: an unknown one, or a value it refuses."""
    try:
        from transformers import TrainingArguments
    except ImportError as error:
        raise ConfigError("training needs transformers: pip install 'engram-store[hf]'") from error
    known = {field.name for field in fields(TrainingArguments) if field.init}
    refuse_unknown(settings.training, known, "training")
    given: dict[str, Any] = {"seed": settings.seed, "report_to": "none", **settings.training}
    for old in ("gradient_checkpointing", "gradient_checkpointing_kwargs"):
        new = old.replace("gradient_checkpointing", _CHECKPOINTING)
        if old in given and new in known:
            given.setdefault(new, given.pop(old))
    name = _CHECKPOINTING if _CHECKPOINTING in known else "gradient_checkpointing"
    if given.get(name):
        # The other kind loses the gradients of a frozen base's first layers.
        given.setdefault(f"{name}_kwargs", {"use_reentrant": False})
    try:
        return TrainingArguments(**given)
    except (ValueError, TypeError, ImportError) as error:
        raise ConfigError(f"training is refused by transformers: {error}") from error


def checkpointing_of(args: "TrainingArguments") -> bool:
    """Whether gradient checkpointing is on, under whichever name."""
    if hasattr(args, _CHECKPOINTING):
        return bool(getattr(args, _CHECKPOINTING))
    return bool(args.gradient_checkpointing)


def plan_of(
    settings: RunSettings,
    args: "TrainingArguments",
    tables: TableShape,
    directory: Path | None,
) -> Plan:
    """The memory plan of a run. Raises: ConfigError.

    Args:
        settings, args: of the run.
        tables: of its store.
        directory: of its store; None: a store process has it, whose disk is not known here.
    """
    lora, memory = settings.lora, settings.memory
    setup = Setup(
        model=read_model(settings.model.path),
        tables=_used(tables, memory.layers),
        mode=settings.mode,
        lora_rank=0 if lora is None else lora.rank,
        lora_targets=LINEARS if lora is None else lora.targets,
        batch=args.per_device_train_batch_size,
        time=settings.data.time,
        accumulate=args.gradient_accumulation_steps,
        dtype=settings.model.dtype,
        quantization=settings.model.quantization,
        gate=memory.gate,
        gate_dtype=memory.dtype,
        checkpointing=checkpointing_of(args),
        autocast=bool(args.bf16 or args.fp16),
        optimizer=_optimizer(str(getattr(args.optim, "value", args.optim))),
        steps=args.max_steps if args.max_steps > 0 else None,
        snapshots=_kept(args) + 1,
        checkpoints=_kept(args),
        device="cuda" if args.device.type == "cuda" else "cpu",
    )
    return make_plan(setup, _limits(settings.limits, directory))


def _used(tables: TableShape, layers: tuple[int, ...] | None) -> TableShape:
    """The tables that the model looks into. Raises: ConfigError."""
    if layers is None:
        return tables
    used = tuple(spec for spec in tables.specs if spec.layer in layers)
    if not used or len(used) < len(set(layers)):
        there = [spec.layer for spec in tables.specs]
        raise ConfigError(f"memory.layers is {list(layers)}; the store has tables for {there}")
    return replace(tables, stored=used)


def _optimizer(name: str) -> str:
    """The planner's kind of a Trainer's optimiser; unknown ones count as AdamW, the largest."""
    if "8bit" in name:
        return "adamw_8bit"
    return "sgd" if name == "sgd" else "adamw"


def _kept(args: "TrainingArguments") -> int:
    """Checkpoints that are there at a time, at most."""
    if str(getattr(args.save_strategy, "value", args.save_strategy)) == "no":
        return 0
    made = args.max_steps // args.save_steps if args.max_steps > 0 and args.save_steps >= 1 else 3
    made = max(int(made), 1)
    # The Trainer writes a new one before it removes the oldest.
    return made if args.save_total_limit is None else min(made, args.save_total_limit + 1)


def _limits(given: LimitSettings, directory: Path | None) -> Limits:
    there = Limits.of_machine(directory or Path())
    if directory is None:
        there = replace(there, disk=None)
    sizes = {
        name: parse_size(text, f"limits.{name}")
        for name in ("vram", "memory", "disk")
        if (text := getattr(given, name)) is not None
    }
    return replace(there, **sizes)
