"""A model's memory: how it is part of the model, what of that is trained, and checkpoints.

What a training loop calls is in `loop`.
"""

import contextlib
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from torch import nn

from engram_store.errors import ProtocolError
from engram_store.session import Session
from engram_store_client import checkpoint
from engram_store_client.adapters import SUBMODULE, MemoryModules
from engram_store_client.gates import Gate, GateConfig
from engram_store_client.ids import TICKET
from engram_store_client.loop import TrainingLoop
from engram_store_client.parameters import (
    Mode,
    ParameterCounts,
    checked_mode,
    count_parameters,
    parameter_groups,
)
from engram_store_client.passes import Reader
from engram_store_client.saving import Tables, save_memory
from engram_store_client.windows import OpenWindows

if TYPE_CHECKING:
    from engram_store_client.trainer import EngramCallback, EngramCollator

__all__ = ["SUBMODULE", "TICKET", "Memory"]


class Memory(TrainingLoop):
    """The gates of an attached model and the tables behind them. Made by `attach`.

    Args:
        name: among the memories of its model.
        model: what the caller trains.
        session: the store.
        gates: by layer.
        modules: what it shares with other memories of the model.
        zero_table: see `attach`.
    """

    def __init__(
        self,
        name: str,
        model: nn.Module,
        session: Session,
        gates: Mapping[int, Gate],
        modules: MemoryModules,
        *,
        zero_table: bool = False,
    ) -> None:
        self.name, self.model, self.session = name, model, session
        self.owns_session = False
        """Whether `detach` closes the session: `from_pretrained` opened it."""
        self._gates = dict(gates)
        windows = OpenWindows(session, zero_table=zero_table)
        reader = Reader(name, self._gates, windows, session.recipe, self._before_pass)
        super().__init__(reader, windows)
        self._modules, self._mode = modules, Mode.PRESERVE_TRAINABLE
        self._attached = False
        self._seen_parameters = 0
        self.gates = nn.ModuleDict({str(number): gate for number, gate in gates.items()})
        """The dense part, by layer number as text."""

    def install(self, entries: tuple[nn.Module, ...], mode: Mode) -> None:
        """Become part of the model: the last step of `attach`.

        Args:
            entries: see `ModelHooks.add`.
            mode: see `attach`.

        Raises:
            ConfigError: as for `set_mode`; the model is as it was.
        """
        self._mode, self._attached = mode, True
        try:
            self._modules.add_memory(self, entries)
            # Beside another memory, 'preserve_trainable' keeps what that one has made of the flags.
            if mode is not Mode.PRESERVE_TRAINABLE:
                self._modules.flags.apply(mode, self._modules.own_parameters(self.model))
        except BaseException:
            self.detach()
            raise
        self._seen_parameters = self._count_parameters()

    @property
    def layers(self) -> tuple[int, ...]:
        """Numbers of the model layers that look up rows."""
        return tuple(self._gates)

    @property
    def gate_configs(self) -> dict[int, GateConfig]:
        """What the gates are, by layer."""
        return {number: gate.config for number, gate in self._gates.items()}

    def gate(self, layer: int) -> Gate:
        """One layer's gate. Raises: KeyError."""
        return self._gates[layer]

    @property
    def enabled(self) -> bool:
        """Whether it speaks: else it neither announces windows nor reads rows.

        Set it between forward passes. Its windows that a batch brings meanwhile are given back.
        """
        return self.reader.enabled

    @enabled.setter
    def enabled(self, enabled: bool) -> None:
        self.reader.enabled = bool(enabled)

    @property
    def scale(self) -> float:
        """Factor on what it adds to the hidden states, 1 unless set; gradients have it too."""
        return self.reader.scale

    @scale.setter
    def scale(self, scale: float) -> None:
        self.reader.scale = float(scale)

    @contextlib.contextmanager
    def disabled(self) -> Iterator[None]:
        """Let the model compute without it for a while."""
        before, self.enabled = self.enabled, False
        try:
            yield
        finally:
            self.enabled = before

    # ------------------------------------------------------------------ what is trained

    @property
    def mode(self) -> Mode:
        """What of the model is trained beside gates and tables; see `attach`."""
        return self._mode

    def set_mode(self, mode: Mode | str) -> None:
        """Train something else of the model from now on; see `attach`.

        Raises:
            ConfigError: no such mode, or 'full' and the model is quantised; nothing changed.
        """
        self._check_attached()
        chosen = checked_mode(mode)
        self.train_gates()
        self._modules.flags.apply(chosen, self._modules.own_parameters(self.model))
        self._mode = chosen

    def train_gates(self) -> bool:
        """Make the gates trainable again if an adapter library froze them.

        `peft.get_peft_model` freezes every parameter that it does not know. This is called by
        whatever here comes before an optimiser is made (`parameter_groups`, `callback`,
        `print_trainable_parameters`), and by a training forward pass, which warns.

        Returns:
            Whether it changed something.
        """
        parameters = list(self.gates.parameters())
        if any(parameter.requires_grad for parameter in parameters):
            return False
        seen, self._seen_parameters = self._seen_parameters, self._count_parameters()
        if self._seen_parameters <= seen:
            return False  # nobody added parameters: the user froze the gates, and means it
        for parameter in parameters:
            parameter.requires_grad_(True)
        # That library has set the flags of the model too.
        self._modules.flags.forget()
        return True

    def _count_parameters(self) -> int:
        """How many the model has beside gates."""
        return sum(1 for _ in self._modules.own_parameters(self.model))

    def _before_pass(self) -> None:
        """Before each training forward pass."""
        if next(self.gates.parameters()).requires_grad or not self.train_gates():
            return
        warnings.warn(
            f"the gates of memory {self.name!r} were frozen after attach(), as peft does with what "
            "it does not know; they are trained again. An optimiser made meanwhile from parameters "
            "that require a gradient lacks them: make it from memory.parameter_groups(), or attach "
            "after get_peft_model()",
            RuntimeWarning,
            stacklevel=2,
        )

    def parameter_groups(
        self, lr: float, weight_decay: float = 0.0, *, gate_lr_factor: float = 1.0
    ) -> list[dict[str, Any]]:
        """Everything dense that is trained, as groups for an optimiser of torch.

        The model's own trainable parameters and the gates of all its memories; each is in one
        group. Norms, biases and convolutions do not decay. Tables are not among them: `commit`
        has their rate, `TABLE_LR_FACTOR` times `lr` in the paper, and they do not decay.

        Args:
            lr: learning rate of the model's own parameters.
            weight_decay: of what decays.
            gate_lr_factor: learning rate of gates, as a multiple of `lr`.
        """
        self._check_attached()
        for memory in self._modules.memories.values():
            memory.train_gates()
        return parameter_groups(
            self.model,
            [self._modules],
            lr=lr,
            weight_decay=weight_decay,
            gate_lr_factor=gate_lr_factor,
        )

    def count_parameters(self) -> ParameterCounts:
        """How many parameters there are and are trained: gates, adapters, base, tables."""
        self._check_attached()
        self.train_gates()
        tables = {number: self.session.tables[number] for number in self.layers}
        return count_parameters(
            self.model, self._gates.values(), tables, tables_trained=not self.zero_table
        )

    def print_trainable_parameters(self) -> None:
        """Print `count_parameters` as peft does."""
        print(self.count_parameters())  # noqa: T201 - what it is for, as in peft

    # ------------------------------------------------------------------ checkpoints

    def save_pretrained(
        self,
        directory: Path | str,
        *,
        tables: Tables = "reference",
        store_directory: Path | str | None = None,
    ) -> None:
        """Take a snapshot of the store and write the gates beside a reference to it.

        Writes `engram_dense.safetensors`, `engram_config.json` for people, and a README.md unless
        there is one of somebody else. `from_pretrained` and `load` read it.

        Args:
            directory: of this memory alone.
            tables: 'reference': the store stays where it is, and must keep the snapshot.
                'export': the snapshot is put into the directory too, as a store of its own; data
                files are hard links where the file system allows.
            store_directory: for 'export' from a store process: where this machine sees the
                directory of its store.

        Raises: what `Session.snapshot` raises, or a commit that is under way; DiskFullError,
        OSError. ConfigError: the directory has another memory's checkpoint, or the tables cannot
        be exported from here. An older checkpoint in the directory is complete until the new one
        is.
        """
        self._check_attached()
        self.finish_commit()
        save_memory(self, Path(directory), tables=tables, store_directory=store_directory)

    def push_to_hub(self, repo_id: str, *, tables: Tables = "reference", **options: Any) -> str:
        """Publish what `save_pretrained` writes; see `hub.push_to_hub`."""
        from engram_store_client.hub import push_to_hub

        self._check_attached()
        return push_to_hub(self, repo_id, tables=tables, **options)

    def load(self, directory: Path | str) -> None:
        """Go back to a checkpoint: gates, step, and the tables unless this is the control arm.

        Raises:
            StoreFileError, ConfigError, ShapeError: the checkpoint is missing, or of other gates.
            SnapshotMismatchError: it belongs to another store, which this one was not exported
                from, or its snapshot is gone.
            What a commit under way raised; load again then.
            In all cases nothing has changed.
        """
        self._check_attached()
        self.finish_commit()
        loaded = checkpoint.read(Path(directory))
        states = loaded.states_for(self._gates)
        if not self.zero_table:
            self._windows.settle()  # the store takes its windows' memory back
            checkpoint.restore_tables(loaded, self.session)
        self._windows.restart_at(loaded.step)
        for number, gate in self._gates.items():
            gate.load_state_dict(states[number])

    def collator(self, tokenizer_or_collator: Any, **options: Any) -> "EngramCollator":
        """A collator that announces each batch that it makes; see `trainer.EngramCollator`."""
        from engram_store_client.trainer import EngramCollator

        return EngramCollator(self, tokenizer_or_collator, **options)

    def callback(self, **options: Any) -> "EngramCallback":
        """A Trainer callback that commits, logs and saves; see `trainer.EngramCallback`."""
        from engram_store_client.trainer import EngramCallback

        self.train_gates()  # before Trainer makes its optimiser
        return EngramCallback(self, **options)

    def detach(self) -> None:
        """Take the memory out of the model; the session stays open.

        It is closed if `from_pretrained` opened it. The last memory that goes leaves the model as
        it was before the first was attached: modules, hooks, and which parameters are trained.
        Detaching twice is fine.

        Raises: what a commit under way raised; the memory is detached all the same.
        """
        if not self._attached:
            return
        self.train_gates()  # tells whether flags were set by somebody else since
        self._attached = False
        self._modules.remove_memory(self)
        self.reader.forget_next()
        try:
            self._windows.close_all()
        finally:
            if self.owns_session:
                self.session.close()

    def _check_attached(self) -> None:
        if not self._attached:
            raise ProtocolError("the memory was detached from its model; attach again")

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        """See `ModelHooks`."""
        self._modules.hooks.__reduce_ex__(protocol)
