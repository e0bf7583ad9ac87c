"""How the memory of a store is divided: shared memory, windows ahead, indexes, page cache."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass

from engram_store.engine.extents import BLOCK_SLOTS
from engram_store.engine.memory import PAGE_BYTES, memory_limit_bytes, process_bytes
from engram_store.engine.memtable import slot_bytes
from engram_store.engine.placement import overlay_capacity
from engram_store.errors import ConfigError
from engram_store.types import TableSpec

_logger = logging.getLogger(__name__)
_MAX_STAGING_BYTES = 2 << 30
_STAGING_SHARE = 8
"""Windows ahead get one part in so many."""
_STEPS_PER_MEMTABLE = 8
"""A memtable should hold so many steps of updates; a step of that size is planned for."""
_SEALED_PIECE_ROWS = 1 << 15
_COPIES_MAPPED = 3
"""Of a table's rows, as files: the base, segments as large, and a new base while it is folded."""
_IN_FLIGHT_SHARE = 4
"""At most one part in so many of the page cache is being read at a time."""
_LEAST_ROWS_IN_FLIGHT = 256
"""With fewer reads at a time a disk is idle between them."""
_LOOKUP_BYTES = 200
"""Per row of a window: hash tables, places, addresses, with two look-ups for each row."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryPlan:
    """How the memory of one store is divided. Bytes, unless a name says otherwise."""

    limit_bytes: int
    """All that the store may use, the page cache of its files included."""
    remap_bytes: int
    """Where each row is: 4 bytes per row of every table."""
    residency_bytes: int
    """Which pages of the files are in memory: a byte per 4 KiB."""
    scratch_bytes: int
    """What hashing, commits, seals and folds work in, for steps that update an eighth of a
    memtable."""
    overlay_bytes: int
    """Shared memory: both memtables."""
    capacity: int
    """Slots of each memtable, of every table."""
    staging_bytes: int
    """Windows that are hashed and gathered ahead of their step, at most."""
    tables: int
    """How many tables share all that."""
    least_page_cache_bytes: int
    """With less for the page cache a disk could not be kept busy."""

    @property
    def fixed_bytes(self) -> int:
        """What the tables need whatever the settings are."""
        return self.remap_bytes + self.residency_bytes

    @property
    def store_bytes(self) -> int:
        """The most that the store takes besides page cache: anonymous and shared memory."""
        return self.fixed_bytes + self.scratch_bytes + self.overlay_bytes + self.staging_bytes

    @property
    def page_cache_bytes(self) -> int:
        """What is left for pages of the store's files."""
        return max(self.limit_bytes - self.store_bytes, 0)

    @property
    def in_flight_bytes(self) -> int:
        """What may be read from the disk at a time for one table."""
        return self.page_cache_bytes // (_IN_FLIGHT_SHARE * self.tables)

    @property
    def fits(self) -> bool:
        """Whether the page cache is left what it needs."""
        return self.limit_bytes - self.store_bytes >= self.least_page_cache_bytes

    def __str__(self) -> str:
        return (
            f"{self.limit_bytes:,} bytes: {self.overlay_bytes:,} for memtables, "
            f"{self.staging_bytes:,} for windows ahead, {self.remap_bytes:,} for where rows are, "
            f"{self.residency_bytes:,} for which pages are in memory, {self.scratch_bytes:,} to "
            f"work in, {self.page_cache_bytes:,} left for the page cache"
        )


def plan_memory(
    specs: Sequence[TableSpec],
    limit_bytes: int,
    *,
    overlay_bytes: int | None = None,
    lookahead_bytes: int | None = None,
) -> MemoryPlan:
    """Divide memory. Pure; whether it `fits` is for the caller to look at.

    Args:
        specs: the tables.
        limit_bytes: what the store may use.
        overlay_bytes: of both memtables; None: a fifth of what the tables leave, at most 1 GiB,
            and less where the page cache would not be left what it needs.
        lookahead_bytes: of windows ahead; None: an eighth of it, at most 2 GiB.

    Raises:
        ConfigError: `overlay_bytes` is less than the tables need.
    """
    remap = sum(4 * spec.rows for spec in specs)
    files = sum(spec.rows * (spec.row_bytes + spec.state_bytes) for spec in specs)
    residency = _COPIES_MAPPED * -(-files // PAGE_BYTES)
    free = max(limit_bytes - remap - residency, 0)
    capacity = overlay_capacity(list(specs), overlay_bytes, free)
    staging = min(_MAX_STAGING_BYTES, free // _STAGING_SHARE)
    least_pages = sum(_LEAST_ROWS_IN_FLIGHT * _pages_per_row(spec) for spec in specs)
    while True:
        plan = MemoryPlan(
            limit_bytes=limit_bytes,
            remap_bytes=remap,
            residency_bytes=residency,
            scratch_bytes=sum(_scratch_bytes(spec, capacity) for spec in specs),
            overlay_bytes=2 * capacity * slot_bytes(list(specs)),
            capacity=capacity,
            staging_bytes=staging if lookahead_bytes is None else lookahead_bytes,
            tables=len(specs),
            least_page_cache_bytes=_IN_FLIGHT_SHARE * least_pages * PAGE_BYTES,
        )
        if plan.fits or overlay_bytes is not None or capacity == BLOCK_SLOTS:
            return plan
        capacity -= BLOCK_SLOTS


def _pages_per_row(spec: TableSpec) -> int:
    """4 KiB pages that a row and its state are on, at least."""
    return sum(-(-size // PAGE_BYTES) for size in (spec.row_bytes, spec.state_bytes))


def _scratch_bytes(spec: TableSpec, capacity: int) -> int:
    step_rows = min(capacity // _STEPS_PER_MEMTABLE, spec.rows)
    row = spec.row_bytes + spec.state_bytes
    # Gradients as they were pushed and summed, float32; old rows and state, with room to spare.
    commit = step_rows * (2 * 4 * spec.dim + row + row // 4 + _LOOKUP_BYTES)
    # The list of live slots, their ids and places, and a bit per row; the pieces that are written.
    seal = 12 * capacity + spec.rows // 8 + _SEALED_PIECE_ROWS * row
    # The rows of all segments, which are as many as the table has.
    fold = 4 * spec.rows
    return commit + seal + fold


def least_limit(
    specs: Sequence[TableSpec],
    *,
    overlay_bytes: int | None = None,
    lookahead_bytes: int | None = None,
) -> int:
    """A limit with which these tables and settings fit, at most a sixteenth more than needed.

    Raises: as `plan_memory`.
    """
    limit = 1 << 20
    while True:
        settings = {"overlay_bytes": overlay_bytes, "lookahead_bytes": lookahead_bytes}
        if plan_memory(specs, limit, **settings).fits:
            return limit
        limit = -(-(limit + limit // 16) // (1 << 20)) * (1 << 20)


def check_plan(
    plan: MemoryPlan,
    specs: Sequence[TableSpec],
    *,
    overlay_bytes: int | None,
    lookahead_bytes: int | None,
) -> None:
    """Refuse what cannot work.

    Args:
        plan: of `plan_memory` for the other arguments.
        specs, overlay_bytes, lookahead_bytes: as there.

    Raises:
        ConfigError: it does not fit; with the numbers, and what would fit.
    """
    if plan.fits:
        return
    given = {"overlay_bytes": overlay_bytes, "lookahead_bytes": lookahead_bytes}
    named = " and ".join(f"{name}={size:,}" for name, size in given.items() if size is not None)
    enough = least_limit(specs, **given)
    smaller = least_limit(specs)
    advice = f"give it {enough:,}"
    if named and smaller < enough:
        advice += f", or leave out {named}: then {smaller:,} are enough"
    raise ConfigError(
        f"memory_bytes is too small for this store{' with ' + named if named else ''}: {plan}, "
        f"which needs at least {plan.least_page_cache_bytes:,}; {advice}"
    )


def store_plan(
    specs: Sequence[TableSpec],
    memory_bytes: int | None,
    overlay_bytes: int | None,
    lookahead_bytes: int | None,
) -> MemoryPlan:
    """The plan of a store that is opened here and now.

    Args:
        specs: the tables.
        memory_bytes: what it may use; None: what the limit of the machine or of the cgroup leaves
            to a process that is as large as this one.
        overlay_bytes, lookahead_bytes: as for `plan_memory`.

    Raises:
        ConfigError: it does not fit into `memory_bytes`.
    """
    there = max(memory_limit_bytes() - process_bytes(), 0)
    limit = there if memory_bytes is None else min(memory_bytes, there)
    given = {"overlay_bytes": overlay_bytes, "lookahead_bytes": lookahead_bytes}
    plan = plan_memory(specs, limit, **given)
    if memory_bytes is not None:
        if memory_bytes > there:
            _logger.warning(
                "memory_bytes is %d, and the limit of this machine or cgroup leaves %d: that is "
                "what the store goes by",
                memory_bytes,
                there,
            )
        check_plan(plan, specs, **given)
    elif not plan.fits:
        _logger.warning("there is little memory for this store: %s", plan)
    return plan
