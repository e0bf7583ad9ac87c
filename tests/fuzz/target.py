"""What a fuzz target is, and what running one input of it means."""

import random
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass

Mutator = Callable[[bytes, random.Random], bytes]
"""A changed copy of an input, made with knowledge of its structure."""
MEBIBYTE = 1 << 20


@dataclass(frozen=True, kw_only=True, slots=True)
class Debt:
    """A known bug: an error that should not come through, and where it does.

    Tolerated while fuzzing, so that other bugs are found; once it is paid, replaying fails.
    """

    target: str
    """Name of the target that shows it."""
    error: type[Exception] | tuple[type[Exception], ...]
    where: str
    """End of the path of a source file that is in the traceback."""
    reason: str
    example: bytes
    """An input that shows it."""
    says: str = ""
    """Part of the error's message."""

    def explains(self, error: BaseException) -> bool:
        """Whether an error is this one."""
        if not isinstance(error, self.error) or self.says not in str(error):
            return False
        frames = traceback.extract_tb(error.__traceback__)
        return any(frame.filename.endswith(self.where) for frame in frames)


@dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """One parser of bytes from outside."""

    name: str
    check: Callable[[bytes], None]
    """Feeds an input to the parser. Raises `allowed` for a refused one; AssertionError if what
    was accepted is not what the parser promises."""
    seeds: Callable[[], Iterable[bytes]]
    """Inputs made from real objects. `check` accepts the first without an error."""
    allowed: tuple[type[Exception], ...]
    """How the parser may refuse an input: errors of this project."""
    mutate: Mutator | None = None
    memory_bytes: int = 256 * MEBIBYTE
    """The parser may take so much address space on top of what the process has."""
    seconds: int = 10
    """No input takes longer."""
    debts: tuple[Debt, ...] = ()
    """Filled by the registry."""
    needs: tuple[str, ...] = ()
    """Modules without which the target cannot run."""


def run_input(target: Target, data: bytes) -> None:
    """Give one input to a target. Raises: whatever is a bug and no debt."""
    try:
        target.check(data)
    except target.allowed:
        return
    except Exception as error:
        if not any(debt.explains(error) for debt in target.debts):
            raise
