"""What a training loop calls between the forward passes: look-ahead, clipping, commits."""

import copy
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, MutableMapping
from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from torch import Tensor

from engram_store.errors import InputError
from engram_store.session import Applied
from engram_store_client.devices.copies import Transfers
from engram_store_client.ids import host_ids
from engram_store_client.passes import Reader
from engram_store_client.windows import Guards, OpenWindows, checked_accumulation

if TYPE_CHECKING:
    from engram_store_client.generation import NextTokenLookAhead


class TrainingLoop:
    """The part of a `Memory` that a training loop meets; none is made apart.

    Args:
        reader: its side of forward passes.
        windows: its windows.
    """

    def __init__(self, reader: Reader, windows: OpenWindows) -> None:
        self.reader, self._windows = reader, windows

    @property
    def zero_table(self) -> bool:
        """Whether this is the control arm: zeros instead of rows, tables untouched."""
        return self._windows.zero_table

    @property
    def step(self) -> int:
        """Number of the next step to commit."""
        return self._windows.step

    @property
    def ticket_key(self) -> str:
        """Key of a batch that names its window for this memory; see `look_ahead`."""
        return self.reader.ticket_key

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
                if (ticket := ahead[-1].get(self.ticket_key)) is not None:
                    tickets = [*tickets[-depth - 1 :], ticket]
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
        """A copy of the batch with the ticket of its window; without, while not enabled."""
        if "input_ids" not in batch:
            raise InputError(f"a batch needs input_ids to look up rows; it has {sorted(batch)}")
        if not self.reader.enabled:
            return copy.copy(batch)
        mask = batch.get("attention_mask")
        ticket = self._windows.announce_ahead(
            host_ids(batch["input_ids"]),
            step,
            attention_mask=None if mask is None else host_ids(mask),
        )
        batch = copy.copy(batch)
        batch[self.ticket_key] = ticket
        return batch

    def next_token(self) -> "NextTokenLookAhead":
        """Look one token ahead in `generate`: `stopping_criteria=[memory.next_token()]`.

        Rows of a token are fetched as soon as it is chosen, while the next forward pass is being
        prepared. It changes no result. Of use where rows come from a disk or another host; without
        effect for beams.
        """
        from engram_store_client.generation import NextTokenLookAhead

        return NextTokenLookAhead(self.reader)

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
                to be run again. See `finish_commit`.

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

    def transfers(self) -> Transfers:
        """How rows and gradients travelled to and from GPUs, and what could not be pinned."""
        return self._windows.transfers()
