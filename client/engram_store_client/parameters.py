"""Which parameters of a model are trained beside its tables, and at which rates."""

import enum
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from engram_store.errors import ConfigError
from engram_store.types import TableSpec
from engram_store_client.gates import Gate


class Mode(enum.StrEnum):
    """What is trained beside gates and tables."""

    ENGRAM_ONLY = "engram_only"
    """Nothing: the model's own parameters are frozen."""
    PRESERVE_TRAINABLE = "preserve_trainable"
    """What was trainable before: adapters of peft, for instance."""
    FULL = "full"
    """All of the model's own parameters."""


def checked_mode(mode: str) -> Mode:
    """Raises: ConfigError."""
    try:
        return Mode(mode)
    except ValueError:
        raise ConfigError(f"unknown mode {mode!r}; there are {', '.join(Mode)}") from None


class TrainableFlags:
    """`requires_grad` of a model's own parameters: as it was found, and as a mode wants it."""

    def __init__(self) -> None:
        self._found: dict[int, tuple[nn.Parameter, bool]] = {}

    def apply(self, mode: Mode, parameters: Iterable[nn.Parameter]) -> None:
        """Set the flags of a model's own parameters; what an earlier mode did is undone.

        Raises:
            ConfigError: FULL, and weights are quantised; no flag changed.
        """
        own = list(parameters)
        quantised = {str(p.dtype) for p in own if not _may_train(p)}
        if mode is Mode.FULL and quantised:
            raise ConfigError(
                f"mode 'full' cannot train weights of {', '.join(sorted(quantised))}: the model is "
                "quantised. Use 'preserve_trainable' with LoRA adapters, or 'engram_only'"
            )
        self.restore()
        if mode is Mode.PRESERVE_TRAINABLE:
            return
        wanted = mode is Mode.FULL
        for parameter in own:
            if parameter.requires_grad is not wanted:
                self._found[id(parameter)] = (parameter, parameter.requires_grad)
                parameter.requires_grad_(wanted)

    def restore(self) -> None:
        """Make the flags what they were when they were found."""
        for parameter, flag in self._found.values():
            parameter.requires_grad_(flag)
        self.forget()

    def forget(self) -> None:
        """Leave the flags as they are: somebody else has set them since."""
        self._found = {}


def _may_train(parameter: nn.Parameter) -> bool:
    return parameter.is_floating_point() or parameter.is_complex()


@dataclass(frozen=True, kw_only=True, slots=True)
class ParameterCounts:
    """How many numbers there are, and how many of them are trained."""

    gates: int
    """Of this memory."""
    gates_trainable: int
    adapters: int
    """Of peft: LoRA and its like."""
    adapters_trainable: int
    base: int
    """All others of the model, other memories' gates included."""
    base_trainable: int
    table_rows: int
    table_values: int
    """Rows times their width."""
    table_bytes: int
    """Of rows and their optimiser state, in the store."""
    tables_trained: bool
    """False for the control arm."""

    @property
    def dense(self) -> int:
        """Parameters in the model."""
        return self.gates + self.adapters + self.base

    @property
    def dense_trainable(self) -> int:
        """Those that a dense optimiser trains."""
        return self.gates_trainable + self.adapters_trainable + self.base_trainable

    def __str__(self) -> str:
        """As peft prints it, and what is in the store."""
        share = 100 * self.dense_trainable / max(1, self.dense)
        tables = "trained in the store" if self.tables_trained else "not trained"
        return (
            f"trainable params: {self.dense_trainable:,d} || all params: {self.dense:,d} || "
            f"trainable%: {share:.4f}\n"
            f"  gates {self.gates_trainable:,d} of {self.gates:,d}, adapters "
            f"{self.adapters_trainable:,d} of {self.adapters:,d}, base {self.base_trainable:,d} of "
            f"{self.base:,d}\n"
            f"  tables: {self.table_values:,d} values in {self.table_rows:,d} rows, "
            f"{self.table_bytes:,d} bytes with their optimiser state, {tables}"
        )


def count_parameters(
    model: nn.Module,
    gates: Iterable[Gate],
    tables: Mapping[int, TableSpec],
    *,
    tables_trained: bool,
) -> ParameterCounts:
    """Count a model's parameters, and the values of the tables that its gates read."""
    own = {id(p): p for gate in gates for p in gate.parameters()}
    adapters = {id(p): p for p in _adapter_parameters(model) if id(p) not in own}
    base = [p for p in model.parameters() if id(p) not in own and id(p) not in adapters]
    specs = tables.values()
    return ParameterCounts(
        gates=_count(own.values()),
        gates_trainable=_count(p for p in own.values() if p.requires_grad),
        adapters=_count(adapters.values()),
        adapters_trainable=_count(p for p in adapters.values() if p.requires_grad),
        base=_count(base),
        base_trainable=_count(p for p in base if p.requires_grad),
        table_rows=sum(spec.rows for spec in specs),
        table_values=sum(spec.rows * spec.dim for spec in specs),
        table_bytes=sum(spec.rows * (spec.row_bytes + 4 * spec.state_width) for spec in specs),
        tables_trained=tables_trained,
    )


def _count(parameters: Iterable[nn.Parameter]) -> int:
    return sum(_size(parameter) for parameter in parameters)


def _size(parameter: nn.Parameter) -> int:
    """Numbers that a parameter stands for: bitsandbytes packs two 4-bit ones into each byte."""
    if type(parameter).__name__ == "Params4bit":
        return 2 * parameter.numel() * parameter.element_size()
    return parameter.numel()


def _adapter_parameters(model: nn.Module) -> Iterable[nn.Parameter]:
    """What peft's tuner layers added to the layers that they wrap."""
    for module in model.modules():
        if any(cls.__name__ == "BaseTunerLayer" for cls in type(module).__mro__):
            for name in getattr(module, "adapter_layer_names", ()):
                added = getattr(module, name, None)
                if isinstance(added, nn.Module):
                    yield from added.parameters()


def parameter_groups(
    model: nn.Module,
    gates: Iterable[nn.Module],
    *,
    lr: float,
    weight_decay: float,
    gate_lr_factor: float,
) -> list[dict[str, Any]]:
    """Groups of everything in a model that is trained, for an optimiser of torch.

    Weights of norms and biases (fewer than two axes) do not decay, nor do convolutions.

    Args:
        model: the model with its memories.
        gates: of all its memories.
        lr: of the model's own parameters.
        weight_decay: of those that decay.
        gate_lr_factor: of gates, on `lr`.

    Returns:
        Groups with 'name', 'params', 'lr' and 'weight_decay'; none is empty.
    """
    theirs = {id(p) for gate in gates for p in gate.parameters()}
    groups: dict[str, dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        gate = id(parameter) in theirs
        decays = parameter.ndim >= 2 and not name.endswith(("norm.weight", "conv.weight"))
        key = f"{'gates' if gate else 'base'}{'' if decays else ', no decay'}"
        group = groups.setdefault(
            key,
            {
                "name": key,
                "params": [],
                "lr": lr * gate_lr_factor if gate else lr,
                "weight_decay": weight_decay if decays else 0.0,
            },
        )
        group["params"].append(parameter)
    return list(groups.values())
