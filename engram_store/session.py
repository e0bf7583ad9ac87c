"""The contract between a trainer and a store, wherever the store runs.

`engram_store.Store` implements it in the trainer's own process; `testing.MemorySession` is
the plain numpy oracle. One contract suite (tests/contract) runs over all of them.
"""

from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Protocol, Self

import numpy as np
from numpy.typing import NDArray

from engram_store.recipes import Recipe
from engram_store.stats import StoreStats
from engram_store.types import GradientBlock, Inverse, RowBlock, RowIds, TableSpec, TokenIds


@dataclass(frozen=True, kw_only=True, slots=True)
class SnapshotRef:
    """Names one snapshot beyond doubt; a trainer's checkpoint carries it."""

    store_id: str
    step: int
    """Steps applied before the snapshot: training resumes with this step number."""
    digest: str
    """SHA-256 of the manifest."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Applied:
    """What one commit did."""

    step: int
    rows: Mapping[int, int]
    """Rows changed, by layer."""
    skipped_rows: Mapping[int, int]
    """Rows left alone because of NaN or infinity (`NonFinitePolicy.SKIP`), by layer."""


class Window(Protocol):
    """The tokens of one micro-batch, and the table rows they look up."""

    @property
    def step(self) -> int | None:
        """The step whose commit takes this window's gradients; None: only read."""
        ...

    def row_ids(self, layer: int) -> RowIds:
        """int32 [n]: the unique row ids, in order of first look-up."""
        ...

    def rows(self, layer: int) -> tuple[RowBlock, Inverse]:
        """The unique rows of one layer, as they are once all earlier steps are applied.

        Waits until they are there. A window that is only read has the rows as they were at the
        first call. Both arrays may be read-only, and may live in memory that is used again after
        the step's commit or `close()`.

        Returns:
            storage dtype [n, dim], and int32 [batch, time, heads] with values in [0, n): the
            look-ups are `rows[inverse]`.

        Raises:
            UnknownLayerError, WindowClosedError, StoreClosedError.
            StepGapError: an earlier step was not committed yet.
        """
        ...

    def ready(self, layer: int) -> bool:
        """Whether `rows` would answer, or refuse, without waiting. Begins nothing.

        Raises:
            UnknownLayerError, WindowClosedError, StoreClosedError.
        """
        ...

    def gradient_buffer(self, layer: int) -> NDArray[np.float32]:
        """Memory for this window's gradient that the store reads where it is.

        Filling and pushing it saves the copy that `push` may have to make of any other array.
        Its content is undefined at first; the same memory every time.

        Returns:
            float32 [n, dim], the shape of `rows(layer)[0]`.

        Raises:
            ReadOnlyError: the window was announced without a step.
            UnknownLayerError, WindowClosedError, StoreClosedError.
        """
        ...

    def push(self, layer: int, gradients: GradientBlock) -> None:
        """Hand over the gradient of the loss with respect to `rows(layer)[0]`.

        Args:
            layer: a table of the store.
            gradients: float32 or bfloat16 bits (uint16) [n, dim], C-contiguous. It must stay
                as it is until the step is committed.

        Raises:
            ReadOnlyError: the window was announced without a step.
            ShapeError, DtypeError, NonFiniteGradientError, UnknownLayerError,
            WindowClosedError, ProtocolError (pushed twice). Nothing is kept then.
        """
        ...

    def close(self) -> None:
        """Give the rows back without a gradient. Closing twice is fine."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(self, *exc: object) -> None: ...


class Session(Protocol):
    """One trainer's connection to a store."""

    @property
    def store_id(self) -> str:
        """Names the store for its whole life."""
        ...

    @property
    def recipe(self) -> Recipe:
        """How tokens become rows."""
        ...

    @property
    def tables(self) -> Mapping[int, TableSpec]:
        """The tables, by layer."""
        ...

    @property
    def step(self) -> int:
        """The number of the next step to commit: steps applied so far, or begun to be."""
        ...

    @property
    def durable_step(self) -> int:
        """Steps below this one outlive the host: those of the newest snapshot.

        All applied steps outlive the store's process.
        """
        ...

    @property
    def world_size(self) -> int:
        """How many ranks train the store together; gradients of all of them are summed."""
        ...

    def announce(
        self,
        tokens: TokenIds,
        step: int | None = None,
        *,
        context: TokenIds | None = None,
        attention_mask: TokenIds | None = None,
    ) -> Window:
        """Tell which tokens a coming forward pass sees; returns at once.

        Args:
            tokens: int64 [batch, time] raw token ids.
            step: the optimiser step that the window belongs to, at least `self.step`; several
                windows may share it (gradient accumulation). None: the window is only read.
            context: int64 [batch, recipe.context_length] ids before `tokens`
                (`recipe.carry`); None: `tokens` start their sequences.
            attention_mask: 0 marks padding, [batch, time]; used by recipes that hash it apart.

        Raises:
            TokenRangeError, ShapeError, DtypeError, ReadOnlyError.
            DuplicateStepError: the step was applied already.
        """
        ...

    def gradient_norm(self) -> float:
        """L2 norm of the pending step's summed table gradients, all layers together."""
        ...

    def commit(
        self,
        step: int,
        lr: float | Mapping[int, float],
        *,
        gradient_scale: float = 1.0,
        eps: float | None = None,
        betas: tuple[float, float] = (0.9, 0.999),
    ) -> Applied:
        """Apply every gradient pushed for a step, all tables together or not at all.

        Gradients of the same row are summed in fp32 in the order of the announcements.

        Args:
            step: must be `self.step`.
            lr: learning rate, one for all tables or by layer.
            gradient_scale: factor on the summed gradients (clipping, averaging).
            eps: None is the optimiser's own default.
            betas: of Adam.

        Raises:
            DuplicateStepError, StepGapError: `step` is not the next one.
            MissingGradientError: a window of the step lacks a gradient.
            CapacityError, ConfigError, ReadOnlyError, StoreClosedError.
        """
        ...

    def begin_commit(
        self,
        step: int,
        lr: float | Mapping[int, float],
        *,
        gradient_scale: float = 1.0,
        eps: float | None = None,
        betas: tuple[float, float] = (0.9, 0.999),
    ) -> "Future[Applied]":
        """Begin what `commit` does, and return once it is checked.

        The rows that the first window of the next step looks up are updated before all others, and
        that window gets them while the rest is still being applied: `Window.rows` waits no longer.
        Results are those of `commit`, bit for bit. One commit is under way at a time; another one,
        `gradient_norm`, `snapshot` and `restore` wait for it.

        Args:
            step, lr, gradient_scale, eps, betas: as for `commit`.

        Returns:
            What `commit` returns or raises while applying. If it raises, windows that were given
            rows of the failed commit are closed.

        Raises: what `commit` raises before it applies anything.
        """
        ...

    def snapshot(self) -> SnapshotRef:
        """Keep the tables as they are now, on disk, under the current step's number."""
        ...

    def restore(self, snapshot: SnapshotRef | int) -> None:
        """Go back to a snapshot (or the snapshot at a step) and forget everything newer.

        Raises:
            SnapshotMismatchError: this store has no such snapshot; nothing changed.
        """
        ...

    def stats(self) -> StoreStats:
        """Counters since the store was opened."""
        ...

    def close(self) -> None:
        """Stop. Closing twice is fine."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(self, *exc: object) -> None: ...
