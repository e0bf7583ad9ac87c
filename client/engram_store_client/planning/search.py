"""What to change so that a run fits: the least drastic changes first."""

import heapq
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import count

from engram_store.cli.output import plural
from engram_store.errors import ConfigError
from engram_store_client.planning import formulas
from engram_store_client.planning.machine import Limits
from engram_store_client.planning.plan import DISK, MEMORY, VRAM, Plan, make_plan
from engram_store_client.planning.setup import Setup
from engram_store_client.planning.tables import TableShape

_TOO_DRASTIC = 3.0
"""A second way is told of if it changes at most so many times as much as the first."""
_TRIED = 4_000
"""Combinations looked at; there are fewer unless a run is very far from fitting."""


@dataclass(frozen=True, slots=True)
class _Change:
    """One step of one knob: what it costs (in taste, not in bytes), and what it is called."""

    cost: float
    text: str
    setup: Setup


_Knob = Callable[[Setup], Iterator[_Change]]


def alternatives(setup: Setup, limits: Limits, wanted: int = 3) -> list[tuple[str, Plan]]:
    """Runs like this one that fit.

    Every combination of a few changes, in the order of how much they change: gradient
    checkpointing and smaller batches (accumulated to the same step) first, then 8-bit optimisers
    and a quantised base, LoRA in place of all weights, shorter sequences, smaller tables.

    Args:
        setup: a run that does not fit.
        limits: what there is.
        wanted: how many at most.

    Returns:
        (what to change, its plan), the least drastic first; the later ones do without the first
        change of those before. Empty: nothing that is known here makes it fit.
    """
    knobs = _knobs(setup, limits, set(make_plan(setup, limits).short_of()))
    found: list[tuple[str, Plan]] = []
    cheapest = 0.0
    while len(found) < wanted:
        best = _cheapest(setup, limits, knobs)
        if best is None:
            break
        cost, changes, plan = best
        cheapest = cheapest or cost
        if cost > _TOO_DRASTIC * cheapest:
            break
        found.append((", ".join(text for _, text in changes), plan))
        # Another way, rather than the same one with something added.
        del knobs[changes[0][0]]
    return found


def _cheapest(
    setup: Setup, limits: Limits, knobs: list[_Knob]
) -> tuple[float, list[tuple[int, str]], Plan] | None:
    """Dijkstra over settings; a knob is turned after those before it, so no setting comes twice."""
    order = count()
    queue: list[tuple[float, int, int, tuple[tuple[int, str], ...], Setup]] = []
    heapq.heappush(queue, (0.0, next(order), 0, (), setup))
    for _ in range(_TRIED):
        if not queue:
            return None
        cost, _, first, changes, tried = heapq.heappop(queue)
        plan = make_plan(tried, limits)
        if changes and plan.fits:
            return cost, list(changes), plan
        for index in range(first, len(knobs)):
            for change in knobs[index](tried):
                # Only the last turn of a knob is told: its text says where it stands now.
                told = tuple(c for c in changes if c[0] != index)
                entry = (*told, (index, change.text))
                heapq.heappush(queue, (cost + change.cost, next(order), index, entry, change.setup))
    return None


def _knobs(setup: Setup, limits: Limits, short: set[str]) -> list[_Knob]:
    """The knobs that help where something is short, the least drastic first."""
    on_device = bool(short & ({VRAM} if setup.device == "cuda" else {MEMORY}))
    in_memory = bool(short & {VRAM, MEMORY})
    of_tables = setup.tables.stored is None and (
        DISK in short or (MEMORY in short and _tables_weigh(setup, limits))
    )
    knobs = (
        (on_device, _checkpointing),
        (on_device, _optimizer),
        (in_memory, _batch),
        (on_device, _quantization),
        (on_device, _mode),
        (in_memory, _time),
        (DISK in short, _snapshots),
        (DISK in short, _checkpoints),
        (of_tables, _state),
        (of_tables, _rows),
        (of_tables, _dim),
        (of_tables, _layers),
    )
    return [knob for helps, knob in knobs if helps]


def _tables_weigh(setup: Setup, limits: Limits) -> bool:
    """Whether tables, and not the model, take a good part of the memory."""
    store, _ = formulas.store_memory(setup)
    return limits.memory is not None and 4 * store.limit_bytes > limits.memory


def _turned(cost: float, text: str, setup: Setup, **changes: object) -> Iterator[_Change]:
    """A change, unless the result makes no sense."""
    try:
        yield _Change(cost, text, replace(setup, **changes))  # type: ignore[arg-type]
    except ConfigError:
        return


def _checkpointing(setup: Setup) -> Iterator[_Change]:
    if not setup.checkpointing:
        yield from _turned(1.0, "gradient checkpointing", setup, checkpointing=True)


def _optimizer(setup: Setup) -> Iterator[_Change]:
    if setup.optimizer == "adamw":
        yield from _turned(1.5, "an 8-bit optimiser (adamw_8bit)", setup, optimizer="adamw_8bit")


def _batch(setup: Setup) -> Iterator[_Change]:
    if setup.batch > 1:
        batch = setup.batch // 2
        accumulate = -(-setup.batch * setup.accumulate // batch)
        text = f"batch {batch}, accumulated {accumulate} times"
        yield from _turned(0.6, text, setup, batch=batch, accumulate=accumulate)


def _quantization(setup: Setup) -> Iterator[_Change]:
    if setup.device != "cuda":
        return
    for cost, bits in ((2.5, "8bit"), (3.5, "4bit")):
        if setup.quantization in ("none", "8bit") and bits != setup.quantization:
            yield from _turned(cost, f"a base of {bits}", setup, quantization=bits)


def _mode(setup: Setup) -> Iterator[_Change]:
    if setup.mode == "full":
        lora = {"mode": "preserve_trainable", "lora_rank": setup.lora_rank or 16}
        yield from _turned(
            4.0, f"LoRA of rank {lora['lora_rank']} instead of all weights", setup, **lora
        )
        # The knobs before this one do not know yet that the base is frozen.
        for cost, bits in ((6.5, "8bit"), (7.5, "4bit")):
            text = f"LoRA of rank {lora['lora_rank']} on a base of {bits}"
            yield from _turned(cost, text, setup, **lora, quantization=bits)
    elif setup.mode == "preserve_trainable" and setup.lora_rank:
        yield from _turned(
            5.0, "gates and tables alone (mode engram_only)", setup, mode="engram_only", lora_rank=0
        )


def _time(setup: Setup) -> Iterator[_Change]:
    if setup.time > 128:
        yield from _turned(3.0, f"sequences of {setup.time // 2:,}", setup, time=setup.time // 2)


def _snapshots(setup: Setup) -> Iterator[_Change]:
    if setup.snapshots > 1:
        kept = max(setup.snapshots // 2, 1)
        yield from _turned(0.5, plural(kept, "snapshot") + " kept", setup, snapshots=kept)


def _checkpoints(setup: Setup) -> Iterator[_Change]:
    if setup.checkpoints > 1:
        kept = max(setup.checkpoints // 2, 1)
        yield from _turned(0.5, plural(kept, "checkpoint") + " kept", setup, checkpoints=kept)


def _state(setup: Setup) -> Iterator[_Change]:
    if setup.tables.optimizer in ("adam", "adagrad"):
        tables = replace(setup.tables, optimizer="rowwise_adagrad")
        yield from _turned(2.0, "row-wise Adagrad for the tables", setup, tables=tables)


def _rows(setup: Setup) -> Iterator[_Change]:
    rows = setup.tables.rows_per_head // 2
    if rows >= 1_000:
        tables = replace(setup.tables, rows_per_head=rows)
        yield from _turned(3.0, f"{rows:,} rows per head", setup, tables=tables)


def _dim(setup: Setup) -> Iterator[_Change]:
    if setup.tables.dim >= 32:
        dim = setup.tables.dim // 2
        yield from _turned(
            3.5, f"rows of {dim} values", setup, tables=replace(setup.tables, dim=dim)
        )


def _layers(setup: Setup) -> Iterator[_Change]:
    shape: TableShape = setup.tables
    if len(shape.layers) > 1:
        left = shape.layers[:-1]
        text = f"tables in layers {', '.join(map(str, left))} only"
        yield from _turned(3.0, text, setup, tables=replace(shape, layers=left))
