"""A model's memory: what a training loop calls between the forward passes."""

import copy
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, MutableMapping
from pathlib import Path
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn

from engram_store.errors import InputError, ProtocolError
from engram_store.session import Applied, Session
from engram_store_client import checkpoint
from engram_store_client.gates import Gate, GateConfig
from engram_store_client.hooks import TICKET, ModelHooks, host_ids
from engram_store_client.structure import Decoder
from engram_store_client.windows import Guards, OpenWindows, checked_accumulation

SUBMODULE = "engram_memory"
"""Under this name the gates are a submodule of the attached model."""


class Memory:
    """The gates of an attached model and the tables behind them. Made by `attach`.

    Args:
        model: what the caller trains; gets the gates as submodule `engram_memory`.
        decoder: its decoder layers.
        session: the store.
        gates: by layer.
        zero_table: see `attach`.
    """

    def __init__(
        self,
        model: nn.Module,
        decoder: Decoder,
        session: Session,
        gates: Mapping[int, Gate],
        *,
        zero_table: bool = False,
    ) -> None:
        self.model, self.session = model, session
        self._gates = dict(gates)
        self._windows = OpenWindows(session, zero_table=zero_table)
        self._frozen: list[nn.Parameter] = []
        self._attached = True
        self.gates = nn.ModuleDict({str(number): gate for number, gate in gates.items()})
        """The dense part, by layer number as text."""
        model.add_module(SUBMODULE, self.gates)
        self._hooks = ModelHooks(model, decoder, self._gates, self._windows, session.recipe)

    @property
    def layers(self) -> tuple[int, ...]:
        """Numbers of the model layers that look up rows."""
        return tuple(self._gates)

    @property
    def gate_configs(self) -> dict[int, GateConfig]:
        """What the gates are, by layer."""
        return {number: gate.config for number, gate in self._gates.items()}

    @property
    def zero_table(self) -> bool:
        """Whether this is the control arm: zeros instead of rows, tables untouched."""
        return self._windows.zero_table

    @property
    def step(self) -> int:
        """Number of the next step to commit."""
        return self._windows.step

    def look_ahead(
        self,
        loader: Iterable[MutableMapping[str, Any]],
        depth: int = 2,
        *,
        accumulate: int = 1,
        train: bool = True,
    ) -> Iterator[MutableMapping[str, Any]]:
        """Iterate over batches while the store already fetches the next ones.

        Args:
            loader: batches with `input_ids` [batch, time], and `attention_mask` if they have one.
            depth: batches announced ahead of the one handed out.
            accumulate: micro-batches of one step.
            train: False for an evaluation loop: windows are only read.

        Yields:
            Copies of the batches with one more entry, which the attached model removes.

        Raises:
            ConfigError: `depth` or `accumulate` makes no sense.
            InputError: a batch has no `input_ids`.
        """
        checked_accumulation(accumulate, depth)
        return self._look_ahead(loader, depth, accumulate, train=train)

    def _look_ahead(
        self,
        loader: Iterable[MutableMapping[str, Any]],
        depth: int,
        accumulate: int,
        *,
        train: bool,
    ) -> Iterator[MutableMapping[str, Any]]:
        first, tickets = self.step, list[int]()
        ahead = deque[MutableMapping[str, Any]]()
        try:
            for index, batch in enumerate(loader):
                step = first + index // accumulate if train else None
                ahead.append(self._announced(batch, step))
                tickets = [*tickets[-depth - 1 :], ahead[-1][TICKET]]
                if len(ahead) > depth:
                    yield ahead.popleft()
            while ahead:
                yield ahead.popleft()
        except BaseException:
            # The loader failed, or the loop was left early (GeneratorExit). Windows that no
            # forward pass has used, that of the batch handed out last among them, would be
            # missed by the next commit.
            self._windows.abandon(tickets)
            raise

    def _announced(
        self, batch: MutableMapping[str, Any], step: int | None
    ) -> MutableMapping[str, Any]:
        """A copy of the batch with the ticket of its window."""
        if "input_ids" not in batch:
            raise InputError(f"a batch needs input_ids to look up rows; it has {sorted(batch)}")
        mask = batch.get("attention_mask")
        ticket = self._windows.announce_ahead(
            host_ids(batch["input_ids"]),
            step,
            attention_mask=None if mask is None else host_ids(mask),
        )
        batch = copy.copy(batch)
        batch[TICKET] = ticket
        return batch

    def clip_grad_norm_(
        self,
        parameters: Iterable[Tensor] | Tensor,
        max_norm: float,
        *,
        gradient_scale: float = 1.0,
    ) -> Tensor:
        """Clip by the global norm of dense and table gradients together, by one coefficient.

        Call it after the last backward pass of a step. Dense gradients are scaled here; those
        of the tables in the following `commit`.

        Args:
            parameters: as for `torch.nn.utils.clip_grad_norm_`.
            max_norm: as there.
            gradient_scale: what `commit` is going to get, so that table gradients count with
                the size they are applied with.

        Returns:
            The norm before clipping.

        Raises: what `Window.push` raises, and a commit that is under way, which it waits for.
        """
        parameters = [parameters] if isinstance(parameters, Tensor) else list(parameters)
        self._windows.push()
        gradients = [p.grad for p in parameters if p.grad is not None]
        dense = torch.nn.utils.get_total_norm(gradients)
        tables = self._windows.gradient_norm() * gradient_scale
        total = torch.hypot(dense, torch.full_like(dense, tables))
        torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, total)
        # The expression that torch applied to the dense part. It keeps NaN, which commit refuses.
        self._windows.clip_scale = float(torch.clamp(max_norm / (total + 1e-6), max=1.0))
        return total

    @overload
    def commit(
        self,
        step: int,
        lr: float | Mapping[int, float],
        *,
        gradient_scale: float = 1.0,
        eps: float | None = None,
        betas: tuple[float, float] = (0.9, 0.999),
        wait: Literal[True] = True,
    ) -> Applied: ...

    @overload
    def commit(
        self,
        step: int,
        lr: float | Mapping[int, float],
        *,
        gradient_scale: float = 1.0,
        eps: float | None = None,
        betas: tuple[float, float] = (0.9, 0.999),
        wait: bool,
    ) -> Applied | None: ...

    def commit(
        self,
        step: int,
        lr: float | Mapping[int, float],
        *,
        gradient_scale: float = 1.0,
        eps: float | None = None,
        betas: tuple[float, float] = (0.9, 0.999),
        wait: bool = True,
    ) -> Applied | None:
        """Hand over the step's gradients and apply them to the tables.

        Other arguments and errors as for `Session.commit`. Clipping of this step is applied on top
        of `gradient_scale`. The control arm counts the step and changes nothing.

        Args:
            wait: False: begin, and return None at once (`Session.begin_commit`). The next forward
                pass waits only for rows that it looks up; results are the same bits. If the commit
                fails, the next call that needs the store raises why, once, whatever it was asked;
                the step can then be committed again, and a forward pass of the one after it has
                to be run again, without its ticket of `look_ahead`. See `finish_commit`.

        Warns: RuntimeWarning, once, when the first two steps gave the tables only zeros.
        """
        return self._windows.commit(
            step, lr, gradient_scale=gradient_scale, eps=eps, betas=betas, wait=wait
        )

    def finish_commit(self) -> Applied | None:
        """Wait for a commit that was begun with `wait=False`; call it after the last step.

        Returns:
            What it did; None: none was under way, or it was waited for already.

        Raises: what it raised, unless that was raised before.
        """
        return self._windows.finish_commit()

    def skip(self, step: int) -> Applied:
        """Commit a step without changing a row, whatever gradients it has.

        For steps that the dense optimiser skips too, such as an overflow of the loss scale.
        """
        return self._windows.skip(step)

    def guards(self) -> Guards:
        """Counters that show whether tables are being trained."""
        return self._windows.guards()

    def freeze_base(self) -> None:
        """Train only gates and tables: the model's own parameters get no gradient."""
        own = {id(parameter) for gate in self._gates.values() for parameter in gate.parameters()}
        for parameter in self.model.parameters():
            if parameter.requires_grad and id(parameter) not in own:
                parameter.requires_grad_(False)
                self._frozen.append(parameter)

    def unfreeze_base(self) -> None:
        """Undo `freeze_base`: parameters that were frozen before it stay so."""
        for parameter in self._frozen:
            parameter.requires_grad_(True)
        self._frozen = []

    def save_pretrained(self, directory: Path | str) -> None:
        """Take a snapshot of the store and write the gates beside a reference to it.

        Raises: what `Session.snapshot` raises, or a commit that is under way; DiskFullError,
        OSError. An older checkpoint in the directory is complete until the new one is.
        """
        self._check_attached()
        self.finish_commit()
        snapshot = self.session.snapshot()
        checkpoint.save(Path(directory), self._gates, snapshot, step=self.step)

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
        loaded = checkpoint.read(Path(directory), self._gates)
        if not self.zero_table:
            checkpoint.restore_tables(loaded, self.session)
        self._windows.restart_at(loaded.step)
        for number, gate in self._gates.items():
            gate.load_state_dict(loaded.states[number])

    def detach(self) -> None:
        """Make the model what it was before `attach`; the session stays open.

        Detaching twice is fine.

        Raises: what a commit under way raised; the memory is detached all the same.
        """
        if not self._attached:
            return
        self._attached = False
        self._hooks.remove()
        self.unfreeze_base()
        delattr(self.model, SUBMODULE)
        self._windows.close_all()

    def _check_attached(self) -> None:
        if not self._attached:
            raise ProtocolError("the memory was detached from its model; attach again")
