"""The windows a trainer has open, by ticket and by step."""

import contextlib
import itertools
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from engram_store.errors import (
    ConfigError,
    DuplicateStepError,
    EngramStoreError,
    ProtocolError,
    StepGapError,
)
from engram_store.session import Applied, Session
from engram_store.types import TokenIds
from engram_store_client.devices.copies import Copies, Transfers
from engram_store_client.rows import WindowRows


@dataclass(frozen=True, kw_only=True, slots=True)
class Guards:
    """Evidence that tables are being trained: counters since `attach`, never live.

    All zero after a training step: something cuts the tables off from the loss.
    """

    backward_calls: int
    """How often a backward pass reached the rows of a window's layer."""
    gradients_pushed: int
    """Gradients handed to the store, one per window and layer."""
    rows_pushed: int
    """Rows in them."""
    zero_gradients: int
    """Gradients that were zero throughout. Normal in the very first step of a gate that starts
    as the identity; later it means that nothing is learned."""


_SUSPICIOUS_STEPS = 2
"""A gate that starts as the identity gives zero gradients in its first step, and only then."""


@dataclass(frozen=True, slots=True)
class _Begun:
    """A commit in the background."""

    step: int
    applied: "Future[Applied]"
    clip_scale: float


class Predicted(Protocol):
    """Who announced windows for steps that were guessed: `trainer.Arrivals`."""

    def claimed(self, ticket: int, step: int | None) -> None:
        """A pass of a step (None: one that only reads) is about to claim a ticket."""
        ...

    def end_step(self, step: int) -> None:
        """All passes of a step are done: close what else was announced for it."""
        ...


class OpenWindows:
    """Announces windows, remembers them by ticket, and hands their gradients over.

    A commit may be under way. What it raises is raised once, by the next call that needs the
    store; the windows of its step stay open until then, so that it can be committed again.

    Args:
        session: the store.
        zero_table: the control arm. Windows are only read, their rows replaced by zeros;
            steps are counted here because the store sees none.
    """

    def __init__(self, session: Session, *, zero_table: bool = False) -> None:
        self._session, self._zero_table = session, zero_table
        self._control_step = session.step
        self._numbers = itertools.count(1)
        self._begun: _Begun | None = None
        self._copies = Copies(session)
        self._process = os.getpid()
        self.clip_scale = 1.0
        """Factor on the pending step's gradients."""
        self.arrivals: Predicted | None = None
        self.announced_again = 0
        """Tickets whose window was not what their forward pass needed, so that it was announced
        on the spot: each costs the look-ahead of one window."""
        self._shapes: dict[int, tuple[int, ...]] = {}
        self._ahead: dict[int, WindowRows] = {}
        self._training: list[WindowRows] = []
        self._steps = 0
        self._backward_calls = self._gradients = self._rows = self._zero_gradients = 0

    @property
    def zero_table(self) -> bool:
        """Whether this is the control arm."""
        return self._zero_table

    @property
    def step(self) -> int:
        """Number of the next step to commit."""
        return self._control_step if self._zero_table else self._session.step

    def _check_process(self) -> None:
        """Raises: ProtocolError: this is a forked child."""
        if os.getpid() != self._process:
            raise ProtocolError(
                f"the model was attached in process {self._process}; its memory does not survive a "
                "fork. Announce and train there, and let data loader workers only make batches"
            )

    def restart_at(self, step: int) -> None:
        """Close everything; the control arm goes on from `step`."""
        self.close_all()
        self._control_step, self.clip_scale = step, 1.0

    def announce(
        self,
        tokens: TokenIds,
        step: int | None,
        *,
        context: TokenIds | None = None,
        attention_mask: TokenIds | None = None,
    ) -> WindowRows:
        """See `Session.announce`; step of None: only read."""
        self._check_process()
        self._copies.poll()
        self._end_commit()
        window = self._session.announce(
            tokens,
            None if self._zero_table else step,
            context=context,
            attention_mask=attention_mask,
        )
        rows = WindowRows(
            window,
            self._session.tables,
            step=step,
            zero_table=self._zero_table,
            copies=self._copies,
        )
        if step is not None:
            self._training.append(rows)
        return rows

    def reserve_ticket(self) -> int:
        """A ticket to announce a window under later; may be called on any thread."""
        return next(self._numbers)

    def announce_ahead(
        self,
        tokens: TokenIds,
        step: int | None,
        *,
        attention_mask: TokenIds | None = None,
        ticket: int | None = None,
    ) -> int:
        """Announce a window that a later forward pass claims by the returned ticket."""
        ticket = self.reserve_ticket() if ticket is None else ticket
        self._ahead[ticket] = self.announce(tokens, step, attention_mask=attention_mask)
        self._shapes[ticket] = tokens.shape
        return ticket

    def claim(self, ticket: int, *, training: bool, shape: tuple[int, ...]) -> WindowRows | None:
        """The window of a ticket; it may be claimed again until it is closed.

        A ticket only says which window was announced early. Where that is not what the forward
        pass needs, it is closed if nobody uses it, and the pass announces its own.

        Args:
            ticket: of the batch.
            training: whether the pass is going to be trained, in the pending step.
            shape: of its token ids.

        Returns:
            None: there is no such window, or it is for another step, only read but to be trained
            or the other way round, or of another shape.
        """
        step = self.step if training else None
        if self.arrivals is not None:
            self.arrivals.claimed(ticket, step)
        window = self._ahead.get(ticket)
        if window is not None and not window.closed:
            if window.step == step and self._shapes.get(ticket) == shape:
                return window
            self.abandon([ticket])
        self.announced_again += 1
        return None

    def prefetch(self, window: WindowRows, gates: Mapping[int, nn.Module]) -> None:
        """A forward pass begins: rows of its layers go to their GPUs. Waits for nothing."""
        with self._commit_first():
            for layer, gate in gates.items():
                device = next(gate.parameters()).device
                if self._copies.path(device) is not None:
                    window.prefetch(layer, device)

    def lookup(
        self, window: WindowRows, layer: int, device: torch.device, dtype: torch.dtype
    ) -> Tensor:
        """See `WindowRows.lookup`."""
        self._check_process()
        with self._commit_first():
            return window.lookup(layer, device, dtype)

    def release(self, window: WindowRows) -> None:
        """Close a window that was only read."""
        self._retire(window)
        self._forget_closed()

    def abandon(self, tickets: Sequence[int]) -> None:
        """Close those of the windows that no forward pass has looked at."""
        for ticket in tickets:
            window = self._ahead.get(ticket)
            if window is not None and not window.used:
                self._retire(window)
        self._forget_closed()

    def push(self) -> None:
        """Hand the pending step's gradients to the store. Raises: what `Window.push` raises."""
        self._check_process()
        if self._zero_table:
            return
        self._end_commit()
        if self.arrivals is not None:
            self.arrivals.end_step(self.step)
        with self._commit_first():
            for window in self._of_step(self.step):
                for block in window.push():
                    self._gradients += 1
                    self._rows += block.shape[0]
                    # Almost always the first rows tell.
                    self._zero_gradients += not (block[:64].any() or block.any())

    def gradient_norm(self) -> float:
        """Of the pending step's pushed gradients, the mean over ranks; 0 in the control arm.

        A call of all ranks.
        """
        self.finish_commit()
        if self._zero_table:
            return 0.0
        return self._session.gradient_norm() / self._session.world_size

    def commit(
        self,
        step: int,
        lr: float | Mapping[int, float],
        *,
        gradient_scale: float,
        eps: float | None,
        betas: tuple[float, float],
        wait: bool = True,
    ) -> Applied | None:
        """Push what was not pushed, then see `Session.commit`.

        `gradient_scale` is multiplied by `clip_scale`, which is 1 afterwards. Without `wait` the
        commit is begun, and None returned.
        """
        if self._zero_table:
            applied = self._commit_control(step)
            self._close_step(step)
            self._count_step()
            return applied if wait else None
        if step == self.step:
            self.push()
        self.finish_commit()
        for window in self._of_step(step):
            window.settle()  # the commit gives their memory to others
        call = self._session.commit if wait else self._session.begin_commit
        # The store sums over ranks; dense gradients are averaged by DDP.
        scale = gradient_scale * self.clip_scale / self._session.world_size
        done = call(step, lr, gradient_scale=scale, eps=eps, betas=betas)
        if isinstance(done, Applied):
            self._close_step(step)
            self._count_step()
            return done
        # Its windows are closed when it is done: the store still reads from them.
        self._begun = _Begun(step, done, self.clip_scale)
        self._copies.commit = done
        self._count_step()
        return None

    def _count_step(self) -> None:
        self.clip_scale = 1.0
        self._steps += 1
        self._warn_if_dead()

    def finish_commit(self) -> Applied | None:
        """Wait for a commit that was begun. Raises, once: what it raised."""
        self._check_process()
        begun = self._begun
        if begun is None:
            return None
        error = begun.applied.exception()
        self._begun = self._copies.commit = None
        if error is not None:
            self._take_back(begun)
            raise error
        self._close_step(begun.step)
        return begun.applied.result()

    def _take_back(self, begun: _Begun) -> None:
        """The step is the next one again, and the one after it must be run again."""
        self.clip_scale = begun.clip_scale
        self._steps -= 1
        for window in self._of_step(begun.step + 1):
            if window.closed_by_store():
                self._retire(window)
        self._forget_closed()

    def _end_commit(self) -> None:
        """See `finish_commit`; waits for nothing."""
        if self._begun is not None and self._begun.applied.done():
            self.finish_commit()

    @contextlib.contextmanager
    def _commit_first(self) -> Iterator[None]:
        """If the store refuses something because a commit failed, that is the reason to give."""
        try:
            yield
        except EngramStoreError:
            self.finish_commit()
            raise

    def skip(self, step: int) -> Applied:
        """Commit a step that changes no row; its windows are closed first."""
        self.finish_commit()
        self._check_next(step)
        self._close_step(step)
        self.clip_scale = 1.0
        applied = self.commit(step, 0.0, gradient_scale=1.0, eps=None, betas=(0.9, 0.999))
        assert applied is not None
        return applied

    def _warn_if_dead(self) -> None:
        """Say it once when the first steps changed no row at all."""
        if self._steps == _SUSPICIOUS_STEPS and 0 < self._gradients == self._zero_gradients:
            warnings.warn(
                f"in {self._steps} steps every gradient of every table was zero: nothing is "
                "learned. Rows that are all zero and a value projection of zero keep each other "
                "so: create the store with random initial rows, or attach with "
                "identity_init=False. Else see that the optimizer got the gates' parameters",
                RuntimeWarning,
                stacklevel=5,
            )

    def _check_next(self, step: int) -> None:
        if step != self.step:
            raise (DuplicateStepError if step < self.step else StepGapError)(step, self.step)

    def _commit_control(self, step: int) -> Applied:
        self._check_next(step)
        self._control_step += 1
        return Applied(step=step, rows=dict.fromkeys(self._session.tables, 0), skipped_rows={})

    def close_all(self) -> None:
        """Give every window back, once no commit is under way. Raises: see `finish_commit`.

        In a forked child nothing happens: the windows are the parent's.
        """
        if os.getpid() != self._process:
            return
        try:
            self.finish_commit()
        finally:
            self._close_windows()

    def _close_windows(self) -> None:
        for window in (*self._training, *self._ahead.values()):
            self._retire(window)
        self._forget_closed()
        self._copies.drain()

    def settle(self) -> None:
        """Wait until no copy to or from a GPU uses memory of the session."""
        for window in (*self._training, *self._ahead.values()):
            window.settle()
        self._copies.drain()

    def transfers(self) -> Transfers:
        """See `Transfers`."""
        return self._copies.transfers()

    def guards(self) -> Guards:
        """See `Guards`."""
        return Guards(
            backward_calls=self._backward_calls + sum(w.backward_calls for w in self._training),
            gradients_pushed=self._gradients,
            rows_pushed=self._rows,
            zero_gradients=self._zero_gradients,
        )

    def _of_step(self, step: int) -> list[WindowRows]:
        return [w for w in self._training if w.step == step and not w.closed]

    def _close_step(self, step: int) -> None:
        for window in self._of_step(step):
            self._retire(window)
        self._forget_closed()

    def _retire(self, window: WindowRows) -> None:
        self._backward_calls += window.backward_calls
        window.close()

    def _forget_closed(self) -> None:
        self._training = [w for w in self._training if not w.closed]
        self._ahead = {t: w for t, w in self._ahead.items() if not w.closed}
        self._shapes = {t: shape for t, shape in self._shapes.items() if t in self._ahead}


def checked_accumulation(accumulate: int, depth: int) -> None:
    """Raises: ConfigError for numbers that make no sense."""
    if accumulate < 1:
        raise ConfigError(f"accumulate must be at least 1, got {accumulate}")
    if depth < 0:
        raise ConfigError(f"depth must not be negative, got {depth}")
