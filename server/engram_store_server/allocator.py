"""How the store process handles memory that it frees."""

import contextlib
import ctypes

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
"""Names of glibc's settings in malloc.h."""
_MAPPED_BYTES = 16 << 20
_TRIMMED_BYTES = 64 << 20


def keep_freed_memory() -> None:
    """Let the C library keep what messages free, as far as it is a few of them.

    By itself glibc gives a megabyte back to the kernel soon after it is free, and the next message
    of that size costs a fault per page again. Other C libraries are left alone.
    """
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_MMAP_THRESHOLD, _MAPPED_BYTES)
        mallopt(_M_TRIM_THRESHOLD, _TRIMMED_BYTES)
