"""Who pins host memory for a GPU. Without CUDA nobody does."""

from typing import Protocol

PIECE_BYTES = 64 << 30
"""Of one registration at most. Drivers since r580 refuse 512 GiB: their page table of 16 bytes per
4 KiB page gets too long."""


class PinError(Exception):
    """A range could not be pinned; the message says why, in the driver's words."""


class Registrar(Protocol):
    """Pins ranges of this process's memory, so that a GPU can copy them while others compute.

    Best effort: memory that is not pinned is copied all the same, only later and slower.
    """

    def register(self, address: int, length: int, *, read_only: bool) -> bool:
        """Pin a range; False: this registrar pins nothing.

        Args:
            address: of the first byte, a multiple of the page size.
            length: bytes, at least 1 and at most `PIECE_BYTES`.
            read_only: this process has mapped the range without write access.

        Raises:
            PinError: it cannot be pinned. No error is left pending for anybody else.
        """
        ...

    def unregister(self, address: int) -> None:
        """Undo `register`, once, before the memory goes. Never raises: finalizers call it."""
        ...


class NoRegistrar:
    """Pins nothing, as without a GPU."""

    def register(self, address: int, length: int, *, read_only: bool) -> bool:  # noqa: ARG002
        """See `Registrar.register`."""
        return False

    def unregister(self, address: int) -> None:
        """See `Registrar.unregister`."""


def pieces(address: int, length: int, most: int = PIECE_BYTES) -> list[tuple[int, int]]:
    """Cut one buffer into ranges that may be registered: (address, length) each. Pure.

    A buffer is a slot, so no piece reaches beyond a slot. `most` is a multiple of the page size.
    """
    return [
        (start, min(most, address + length - start))
        for start in range(address, address + length, most)
    ]
