"""Pinning with CUDA's runtime: `cudaHostRegister`. Needs torch with CUDA."""

import contextlib
import ctypes
import os
from functools import cache
from pathlib import Path
from typing import Any

import torch

from engram_store_client.devices.registrar import PinError

_PORTABLE, _READ_ONLY = 0x01, 0x08
"""Flags of cudaHostRegister."""
_READ_ONLY_SUPPORTED = 113
"""cudaDevAttrHostRegisterReadOnlySupported; the runtime was built without it if it says no."""


class CudaRegistrar:
    """Implements `Registrar` for one device; what it pins is pinned for all.

    Args:
        device: with its index. Registering makes a context there, and nowhere else.
    """

    def __init__(self, device: torch.device) -> None:
        self._device, self._process = device, os.getpid()

    def register(self, address: int, length: int, *, read_only: bool) -> bool:
        """See `Registrar.register`."""
        if read_only and not _pins_read_only(self._device.index):
            raise PinError(
                "the driver cannot pin memory that is mapped read-only, as the rows of a store "
                "process are"
            )
        flags = _PORTABLE | (_READ_ONLY if read_only else 0)
        cudart = _cudart()
        # Any thread may come here; its own current device need not be the trainer's.
        with torch.cuda.device(self._device):
            result = cudart.cudaHostRegister(address, length, flags)
            if int(result) == 0:
                return True
            reason = f"cudaHostRegister: {cudart.cudaGetErrorString(result)}"
            _clear_error(self._device)
        raise PinError(reason)

    def unregister(self, address: int) -> None:
        """See `Registrar.unregister`."""
        if os.getpid() != self._process:  # a forked child has no context
            return
        # At the interpreter's end the runtime may be gone already, and the memory with it.
        with contextlib.suppress(Exception), torch.cuda.device(self._device):
            if int(_cudart().cudaHostUnregister(address)):
                _clear_error(self._device)


def _cudart() -> Any:
    return torch.cuda.cudart()  # type: ignore[no-untyped-call]


def is_integrated(device: torch.device) -> bool:
    """Whether the GPU shares the host's memory."""
    return bool(getattr(torch.cuda.get_device_properties(device), "is_integrated", False))


def _clear_error(device: torch.device) -> None:
    """Take back the error that the runtime keeps for this thread.

    Otherwise the next kernel that anybody starts reports it as its own.
    """
    runtime = _runtime()
    if runtime is not None:
        runtime.cudaGetLastError()
        return
    # No runtime to call (linked statically): let a kernel of ours report it.
    with contextlib.suppress(RuntimeError):
        torch.ones(1, device=device).add_(1)


def _pins_read_only(index: int | None) -> bool:
    """Whether `_READ_ONLY` can be used; where it cannot be asked, trying will tell."""
    runtime = _runtime()
    if runtime is None:
        return True
    value = ctypes.c_int(0)
    error = runtime.cudaDeviceGetAttribute(
        ctypes.byref(value), ctypes.c_int(_READ_ONLY_SUPPORTED), ctypes.c_int(index or 0)
    )
    if error:
        runtime.cudaGetLastError()
        return True
    return bool(value.value)


@cache
def _runtime() -> ctypes.CDLL | None:
    """The CUDA runtime that torch has loaded; None: it is part of torch."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        path = line.partition("/")[2]
        if "libcudart.so" in path:
            return ctypes.CDLL(f"/{path}")
    return None
