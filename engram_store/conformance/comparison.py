"""One comparison with a golden vector, and the two ways to make it."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

ATOL = 1e-5
RTOL = 1e-5
"""float32 results agree up to the order of summation."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """What came out beside what a vector file says."""

    kind: str
    """Kind of vector file, such as "recipe_a"."""
    file: str
    """Its name in the directory."""
    what: str
    """Which of its values."""
    passed: bool
    detail: str = ""
    """Of a miss: where the two differ first, and how."""


def exact(kind: str, file: str, what: str, got: object, expected: object) -> Comparison:
    """Compare integers, bit patterns or texts: all must be equal."""
    if isinstance(expected, str | dict) or expected is None:
        passed = bool(got == expected)
        return Comparison(kind, file, what, passed, "" if passed else _versus(got, expected))
    ours, theirs = np.asarray(got), np.asarray(expected)
    if ours.shape != theirs.shape:
        return Comparison(kind, file, what, False, _shapes(ours, theirs))
    return _judge(kind, file, what, ours, theirs, ours == theirs)


def close(kind: str, file: str, what: str, got: ArrayLike, expected: ArrayLike) -> Comparison:
    """Compare floats: |got - expected| <= 1e-5 + 1e-5 |expected|, same infinities and NaNs."""
    ours, theirs = np.asarray(got), np.asarray(expected)
    if ours.shape != theirs.shape:
        return Comparison(kind, file, what, False, _shapes(ours, theirs))
    agree = np.isclose(ours, theirs, atol=ATOL, rtol=RTOL, equal_nan=True)
    return _judge(kind, file, what, ours, theirs, agree)


def _judge(
    kind: str,
    file: str,
    what: str,
    ours: NDArray[np.generic],
    theirs: NDArray[np.generic],
    agree: NDArray[np.bool_] | np.bool_,
) -> Comparison:
    """A comparison of arrays of one shape, with the first position where they disagree."""
    differing = np.argwhere(~np.asarray(agree))
    if not len(differing):
        return Comparison(kind, file, what, True)
    first = tuple(int(axis) for axis in differing[0])
    at = f"first at {list(first)}: " if first else ""
    detail = f"{len(differing)} of {ours.size} differ, {at}{_versus(ours[first], theirs[first])}"
    return Comparison(kind, file, what, False, detail)


def _versus(got: object, expected: object) -> str:
    return f"got {got!s}, expected {expected!s}"


def _shapes(ours: NDArray[np.generic], theirs: NDArray[np.generic]) -> str:
    return f"got shape {list(ours.shape)}, expected {list(theirs.shape)}"


@dataclass(frozen=True, slots=True)
class Subject:
    """What a row of comparisons is about, so that each need not repeat it."""

    kind: str
    file: str
    name: str = ""
    """Prefix of each comparison's `what`."""

    def part(self, name: str) -> "Subject":
        """A part of this subject."""
        return Subject(self.kind, self.file, f"{self._prefix}{name}")

    def exact(self, what: str, got: object, expected: object) -> Comparison:
        """See the function `exact`."""
        return exact(self.kind, self.file, self._prefix + what, got, expected)

    def close(self, what: str, got: ArrayLike, expected: ArrayLike) -> Comparison:
        """See the function `close`."""
        return close(self.kind, self.file, self._prefix + what, got, expected)

    @property
    def _prefix(self) -> str:
        return f"{self.name}, " if self.name else ""
