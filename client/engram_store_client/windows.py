"""The windows a trainer has open, by ticket and by step."""

import contextlib
import itertools
import warnings
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass

import torch
from torch import Tensor

from engram_store.errors import (
    ConfigError,
    DuplicateStepError,
    EngramStoreError,
    ProtocolError,
    StepGapError,
)
from engram_store.session import Applied, Session
from engram_store.types import TokenIds
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
        self.clip_scale = 1.0
        """Factor on the pending step's gradients."""
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
        self._end_commit()
        window = self._session.announce(
            tokens,
            None if self._zero_table else step,
            context=context,
            attention_mask=attention_mask,
        )
        rows = WindowRows(window, self._session.tables, step=step, zero_table=self._zero_table)
        if step is not None:
            self._training.append(rows)
        return rows

    def announce_ahead(
        self, tokens: TokenIds, step: int | None, *, attention_mask: TokenIds | None = None
    ) -> int:
        """Announce a window that a later forward pass claims by the returned ticket."""
        ticket = next(self._numbers)
        self._ahead[ticket] = self.announce(tokens, step, attention_mask=attention_mask)
        return ticket

    def claim(self, ticket: int) -> WindowRows:
        """The window of a ticket; it may be claimed again until it is closed.

        Raises:
            ProtocolError: no such window is open.
        """
        window = self._ahead.get(ticket)
        if window is None or window.closed:
            raise ProtocolError(
                f"no window is open under ticket {ticket}; was its batch used after commit(), "
                "or made by another look_ahead()?"
            )
        return window

    def lookup(
        self, window: WindowRows, layer: int, device: torch.device, dtype: torch.dtype
    ) -> Tensor:
        """See `WindowRows.lookup`."""
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
        if self._zero_table:
            return
        self._end_commit()
        with self._commit_first():
            for window in self._of_step(self.step):
                for block in window.push():
                    self._gradients += 1
                    self._rows += block.shape[0]
                    # Almost always the first rows tell.
                    self._zero_gradients += not (block[:64].any() or block.any())

    def gradient_norm(self) -> float:
        """Of the pending step's pushed gradients; 0 in the control arm."""
        self.finish_commit()
        return 0.0 if self._zero_table else self._session.gradient_norm()

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
        call = self._session.commit if wait else self._session.begin_commit
        scale = gradient_scale * self.clip_scale
        done = call(step, lr, gradient_scale=scale, eps=eps, betas=betas)
        if isinstance(done, Applied):
            self._close_step(step)
            self._count_step()
            return done
        # Its windows are closed when it is done: the store still reads from them.
        self._begun = _Begun(step, done, self.clip_scale)
        self._count_step()
        return None

    def _count_step(self) -> None:
        self.clip_scale = 1.0
        self._steps += 1
        self._warn_if_dead()

    def finish_commit(self) -> Applied | None:
        """Wait for a commit that was begun. Raises, once: what it raised."""
        begun = self._begun
        if begun is None:
            return None
        error = begun.applied.exception()
        self._begun = None
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
        """Give every window back, once no commit is under way. Raises: see `finish_commit`."""
        try:
            self.finish_commit()
        finally:
            self._close_windows()

    def _close_windows(self) -> None:
        for window in (*self._training, *self._ahead.values()):
            self._retire(window)
        self._forget_closed()

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


def checked_accumulation(accumulate: int, depth: int) -> None:
    """Raises: ConfigError for numbers that make no sense."""
    if accumulate < 1:
        raise ConfigError(f"accumulate must be at least 1, got {accumulate}")
    if depth < 0:
        raise ConfigError(f"depth must not be negative, got {depth}")
