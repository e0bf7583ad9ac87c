"""Counting by hash head, and how many different things were met, in little memory.

Every head has rows of its own, one range after the other. Which one a row lies in is told by a
table of guesses, one per 4,096th of the rows, and a step or two from there.

Distinct things are counted by HyperLogLog: 2^14 registers keep the longest run of leading zeros
that their share of 64-bit hashes has begun with. The standard error of an estimate is 0.8 %.

Source: Flajolet et al., "HyperLogLog" (2007); Ertl, "New cardinality estimation algorithms for
HyperLogLog sketches" (arXiv:1702.01284), algorithm 6, for the estimate.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic
from numpy.typing import NDArray

from engram_store.kernels.hashing import _look_around
from engram_store.kernels.intrinsics import prefetch_write
from engram_store.kernels.rows import AHEAD, JIT

REGISTERS = 1 << 14
_BITS = np.uint64(14)
_RANKS = 64 - 14
"""A register is at most one more."""
_GUESS_BITS = 12
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


@intrinsic
def _leading_zeros(_context: Any, _value: Any) -> Any:
    """Of a uint64; 64 of zero."""

    def codegen(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        return builder.ctlz(args[0], ir.Constant(ir.IntType(1), 0))

    return types.uint64(types.uint64), codegen


@dataclass(frozen=True, slots=True)
class HeadRanges:
    """Which rows of a table belong to which head."""

    starts: NDArray[np.int64]
    """int64 [columns + 1]: first row of each, and the rows of the table."""
    guesses: NDArray[np.uint16]
    """The head of every 2^shift-th row."""
    shift: int

    @classmethod
    def of(cls, offsets: Sequence[int], rows: int) -> "HeadRanges":
        """By the columns' first rows, ascending from 0, and the rows of the table.

        Rows behind the last head's are never used, and count as its own.
        """
        starts = np.array([*offsets, rows], np.int64)
        shift = max(0, rows.bit_length() - _GUESS_BITS)
        first_rows = np.arange(0, rows, 1 << shift, dtype=np.int64)
        guesses = np.searchsorted(starts[:-1], first_rows, "right") - 1
        return cls(starts, guesses.astype(np.uint16), shift)


@njit(inline="always")
def _head_of(row, starts, guesses, shift):
    head = np.uint64(guesses[np.uint64(row >> shift)])
    while row >= starts[head + np.uint64(1)]:
        head += np.uint64(1)
    return head


@njit(inline="always")
def _mix(value):
    """A hash of 64 bits whose every bit depends on all of the value (Steele et al., SplitMix)."""
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


@njit(inline="always")
def _note(hashed, registers, line):
    # The bit that is set ends the run where the hash ends.
    rest = (hashed << _BITS) | np.uint64(1 << 13)
    rank = np.uint8(_leading_zeros(rest) + np.uint64(1))
    at = hashed >> np.uint64(64 - 14)
    if registers[line, at] < rank:
        registers[line, at] = rank


@njit(**JIT)
def count_heads(rows, places, slots, starts, guesses, shift, found, registers):
    """Count a window's rows by head, and take note of them.

    Args:
        rows: int32 [n], distinct.
        places: int32 [n], from the remap.
        slots: of both memtables: places up to there are in shared memory, 0 is the base.
        starts, guesses, shift: see `HeadRanges`.
        found: int64 [columns, 2], in and out: rows, and rows in shared memory.
        registers: uint8 [columns, REGISTERS], in and out.
    """
    for i in range(rows.size):
        row, place = np.int64(rows[i]), np.int64(places[i])
        head = _head_of(row, starts, guesses, shift)
        found[head, 0] += 1
        found[head, 1] += np.int64((place > 0) & (place <= slots))
        _note(_mix(np.uint64(row + 1) * _GOLDEN), registers, head)


@njit(**JIT)
def count_cold(rows, positions, starts, guesses, shift, found):
    """Count by head the rows (int32) at some positions (int32 [n]) in `found`, int64 [columns]."""
    for i in range(positions.size):
        row = np.int64(rows[np.uint64(positions[i])])
        found[_head_of(row, starts, guesses, shift)] += 1


@njit(**JIT)
def count_ngrams(tokens, context, plan, scratch, lines, registers):
    """Take note of a window's n-grams as its hash sees them, before it is reduced to rows.

    Tokens count as the ids that are hashed, the filler included. An n-gram is known by 64 bits
    that do not depend on the recipe's multipliers, so that poor ones are found out.

    Args:
        tokens: int64 [batch, time].
        context: int64 [batch, max_order - 1].
        plan: `hashing.HashPlan` of the layer.
        scratch: int64 [2, max_order - 1 + time], overwritten.
        lines: int64 [max_order]: line of `registers` of each length of n-grams, -1: not hashed.
        registers: uint8 [orders, REGISTERS], in and out.
    """
    before = np.uint64(context.shape[1])
    for sequence in range(tokens.shape[0]):
        _look_around(tokens[sequence], context[sequence], plan, scratch[0], scratch[1])
        for t in range(np.uint64(tokens.shape[1])):
            here = before + t
            known = _GOLDEN
            for k in range(np.uint64(lines.size)):
                back = plan.look_back[k]
                seen = np.int64(back) <= scratch[1, here]
                token = scratch[0, here - back] if seen else np.int64(plan.filler)
                known = (known ^ np.uint64(token)) * np.uint64(0xD1342543DE82EF95)
                known ^= known >> np.uint64(32)
                if lines[k] >= 0:
                    _note(_mix(known), registers, np.uint64(lines[k]))


@njit(**JIT)
def mark_rows(rows, starts, guesses, shift, marks, found):
    """Mark rows, and count by head those that were not marked before.

    Args:
        rows: int32 [n].
        starts, guesses, shift: see `HeadRanges`.
        marks: uint8 [table rows / 8 + 1], in and out: one bit per row.
        found: int64 [columns], in and out.
    """
    base = marks.ctypes.data
    n = rows.size
    for i in range(n):
        if i + AHEAD < n:
            prefetch_write(base + (np.int64(rows[i + AHEAD]) >> 3))
        row = np.int64(rows[i])
        at, bit = np.uint64(row >> 3), np.uint8(1 << (row & 7))
        if not marks[at] & bit:
            marks[at] |= bit
            found[_head_of(row, starts, guesses, shift)] += 1


def estimate_distinct(registers: NDArray[np.uint8]) -> int:
    """How many different things registers (uint8 [REGISTERS]) have noted."""
    counts = np.bincount(registers, minlength=_RANKS + 2).astype(float).tolist()
    size = float(registers.size)
    if counts[0] == size:
        return 0
    total = size * _tau(1 - counts[_RANKS + 1] / size)
    for rank in range(_RANKS, 0, -1):
        total = (total + counts[rank]) / 2
    total += size * _sigma(counts[0] / size)
    return round(size * size / (2 * math.log(2) * total))


def _sigma(x: float) -> float:
    """X + the sum over k > 0 of x^(2^k) 2^(k - 1), for x below 1."""
    total, weight, previous = x, 1.0, -1.0
    while total != previous:
        x *= x
        previous = total
        total += x * weight
        weight *= 2
    return total


def _tau(x: float) -> float:
    """(1 - x - the sum over k > 0 of (1 - x^(2^-k))^2 2^-k) / 3."""
    if x in (0.0, 1.0):
        return 0.0
    total, weight, previous = 1 - x, 1.0, -1.0
    while total != previous:
        x = x**0.5
        previous = total
        weight /= 2
        total -= (1 - x) ** 2 * weight
    return total / 3
