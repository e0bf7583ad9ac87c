"""Memory that is used again when nothing refers to it any more."""

import weakref
from collections import deque

import numpy as np
from numpy.typing import NDArray


class ReusedMemory:
    """Lends arrays; a fresh one would cost a fault per page.

    What was lent comes back by itself when the last view of it is gone, so no holder can be
    surprised. Any thread may borrow, and views may die on any.

    Args:
        kept_bytes: at most so much is kept for the next borrower.
    """

    def __init__(self, kept_bytes: int) -> None:
        self._kept_bytes = kept_bytes
        # Views die at any time, under any lock: what they call takes none.
        self._returned: deque[NDArray[np.uint8]] = deque()

    def take(self, size: int) -> NDArray[np.uint8]:
        """Uint8 [size], content undefined."""
        length = 1 << max(size - 1, 4095).bit_length()
        memory = self._find(length)
        if memory is None:
            memory = np.empty(length, np.uint8)
        # Views refer to the array whose base is no array: this one, not the memory itself.
        lent = np.frombuffer(memory.data[:size], np.uint8)
        weakref.finalize(lent, self._returned.append, memory).atexit = False
        return lent

    def _find(self, length: int) -> NDArray[np.uint8] | None:
        """Memory of that length; the oldest beyond `kept_bytes` is let go."""
        fitting, others, kept = None, [], 0
        while self._returned:
            try:
                memory = self._returned.pop()  # the newest first: the likeliest in the cache
            except IndexError:  # another thread was faster
                break
            if fitting is None and memory.size == length:
                fitting = memory
            elif kept + memory.size <= self._kept_bytes:
                kept += memory.size
                others.append(memory)
        self._returned.extend(reversed(others))
        return fitting
