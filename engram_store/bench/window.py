"""From the tokens of a step to its rows, part by part, beside what numpy and memory allow."""

import numpy as np
from numpy.typing import NDArray

from engram_store.bench import plain
from engram_store.bench.harness import (
    Case,
    ComparedWorkload,
    Report,
    Target,
    describe_machine,
    measure,
)
from engram_store.bench.peers.compare import Comparison
from engram_store.bench.workplace import BATCHES, LAYER, Batch, Say, Workplace, touched
from engram_store.engine.lookup import LookupScratch
from engram_store.types import RowIds, TokenIds

_TOTAL, _NUMPY, _MEMORY = "window", "numpy: window", "memory: window"
_SMALL_PAGES = "memory in small pages: gather"
_REFERENCES = {
    "hash": ("numpy: hash",),
    "dedup": ("numpy: dedup",),
    "remap + gather": ("numpy: gather", "memory: gather", _SMALL_PAGES, "memcpy"),
    _TOTAL: (_NUMPY, _MEMORY),
    "announce to rows": (_NUMPY, _TOTAL),
}


def bench_window(place: Workplace, say: Say) -> Report:
    """Measure a window of one layer; its workload is a `ComparedWorkload`."""
    workload = place.workload
    assert isinstance(workload, ComparedWorkload)
    report = Report(bench="window", machine=describe_machine(), workload=place.describe())
    cases = _cases(place)
    _check_numpy(place)
    say(f"measuring {workload.repetitions} rounds")
    report.timings = measure(cases, repetitions=workload.repetitions, batches=BATCHES)
    report.references = dict(_REFERENCES)
    medians = {timing.name: timing.median_ms for timing in report.timings}
    report.targets = [
        Target.at_most("a window, per layer", 4, medians[_TOTAL]),
        Target.times_faster("a window against numpy", 6, medians[_NUMPY] / medians[_TOTAL]),
    ]
    report.notes = [
        "'memory' is the same steps over rows in anonymous memory (huge pages), without a remap",
        "'small pages' are those of 4 KiB that a file has in the page cache unless it is lucky",
        "'announce to rows' adds the session: checks, a copy of the tokens and two thread hops",
    ]
    if workload.peers:
        unique, lookups = cases["remap + gather"], _every_lookup(place)
        del cases  # and with them the table in memory: peers need the room
        Comparison(place, report, say).reads(unique, lookups)
        report.notes += [
            "'rows' is 'remap + gather', in turn with each peer; peers are compared row by row",
            "'look-ups': repeats removed, gathered, and copied out for each look-up",
        ]
    return report


def _every_lookup(place: Workplace) -> Case:
    """What a peer that is asked for repeats has to be compared with."""
    batches, spec, scratch = place.batches, place.spec, LookupScratch()
    most, lookups = max(batch.rows.size for batch in batches), batches[0].lookups.size
    slot = touched(most * spec.dim, spec.dtype.storage).reshape(most, spec.dim)
    out = touched(lookups * spec.dim, spec.dtype.storage).reshape(lookups, spec.dim)
    inverse = touched(lookups, np.int32)

    def case(number: int) -> None:
        rows = scratch.deduplicate(batches[number].lookups, inverse)
        place.engine.gather(LAYER, rows, slot[: rows.size])
        np.take(slot, inverse, axis=0, out=out, mode="clip")

    return case


def _cases(place: Workplace) -> dict[str, Case]:
    batches, spec, engine, store = place.batches, place.spec, place.engine, place.store
    most = max(batch.rows.size for batch in batches)
    slot = touched(most * spec.dim, spec.dtype.storage).reshape(most, spec.dim)
    lookups = touched(batches[0].lookups.size, np.int32)
    inverse = touched(batches[0].lookups.size, np.int32)
    scratch = LookupScratch()
    flat = np.memmap(place.flat_file, spec.dtype.storage, "r").reshape(-1, spec.dim)
    assert int(flat[:, 0].sum()) >= 0  # reads every page once
    memory = place.rows_in_memory()
    memory_bytes, slot_bytes = memory.view(np.uint8), slot.view(np.uint8)
    small_pages = place.rows_in_small_pages().view(np.uint8)

    def look_up(batch: Batch) -> RowIds:
        return scratch.look_up(place.recipe, LAYER, batch.tokens, None, None)[0]

    def window(number: int) -> None:
        rows = look_up(batches[number])
        engine.gather(LAYER, rows, slot[: rows.size])

    def memory_window(number: int) -> None:
        plain.gather(memory_bytes, look_up(batches[number]), slot_bytes)

    def numpy_window(number: int) -> None:
        rows, _ = np.unique(numpy_hash(place, batches[number].tokens), return_inverse=True)
        flat[rows]

    def session_window(number: int) -> None:
        with store.announce(batches[number].tokens) as announced:
            announced.rows(LAYER)

    def hash_only(number: int) -> None:
        tokens = batches[number].tokens
        place.recipe.rows(LAYER, tokens, out=lookups.reshape(*tokens.shape, -1))

    def dedup_only(number: int) -> None:
        scratch.deduplicate(batches[number].lookups, inverse)

    def gather_only(number: int) -> None:
        engine.gather(LAYER, batches[number].rows, slot[: batches[number].rows.size])

    def memory_gather(number: int) -> None:
        plain.gather(memory_bytes, batches[number].rows, slot_bytes)

    def small_pages_gather(number: int) -> None:
        plain.gather(small_pages, batches[number].rows, slot_bytes)

    def memcpy(number: int) -> None:
        # A run of rows of the big table, so that the source is as cold as the rows are.
        count = batches[number].rows.size
        first = number * (len(memory) - count) // BATCHES
        np.copyto(slot[:count], memory[first : first + count])

    def numpy_dedup(number: int) -> None:
        np.unique(batches[number].lookups, return_inverse=True)

    def numpy_gather(number: int) -> None:
        flat[batches[number].rows]

    def numpy_hash_only(number: int) -> None:
        numpy_hash(place, batches[number].tokens)

    look_up(batches[0])
    return {
        "hash": hash_only,
        "numpy: hash": numpy_hash_only,
        "dedup": dedup_only,
        "numpy: dedup": numpy_dedup,
        "remap + gather": gather_only,
        "memory: gather": memory_gather,
        _SMALL_PAGES: small_pages_gather,
        "memcpy": memcpy,
        "numpy: gather": numpy_gather,
        _TOTAL: window,
        _MEMORY: memory_window,
        _NUMPY: numpy_window,
        "announce to rows": session_window,
    }


def numpy_hash(place: Workplace, tokens: TokenIds) -> NDArray[np.int64]:
    """Rows of every look-up, the way the published demos compute them: numpy and `%`."""
    recipe, layer = place.recipe, place.recipe.layer(LAYER)
    assert recipe.token_map is not None
    ids = recipe.token_map[tokens].astype(np.int64)
    mix = ids * layer.multipliers[0]
    columns = []
    offsets = iter(layer.offsets)
    for back in range(1, recipe.max_order):
        shifted = np.full_like(ids, recipe.filler)
        shifted[:, back:] = ids[:, :-back]
        mix = mix ^ (shifted * layer.multipliers[back])
        columns += [mix % modulus + next(offsets) for modulus in layer.moduli[back - 1]]
    return np.stack(columns, axis=-1)


def _check_numpy(place: Workplace) -> None:
    """The reference must do the same work."""
    batch = place.batches[0]
    if not np.array_equal(numpy_hash(place, batch.tokens).reshape(-1), batch.lookups):
        raise AssertionError("the numpy reference hashes differently")
