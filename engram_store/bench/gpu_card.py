"""The device of `bench train --device cuda`: its limit, its peak of memory, its trace.

Needs torch.
"""

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch

from engram_store.errors import ConfigError


class Card(Protocol):
    """Where arms train."""

    @property
    def device(self) -> torch.device:
        """The model's."""
        ...

    def limit(self, vram_bytes: int) -> None:
        """Let this process have so much memory of the device."""
        ...

    def begin_peak(self) -> None:
        """Forget what an earlier arm took."""
        ...

    def peak_bytes(self) -> int:
        """Most memory that was taken since then."""
        ...

    def describe(self) -> dict[str, Any]:
        """What it is."""
        ...


class CudaCard:
    """Implements `Card` for the current CUDA device.

    Raises:
        ConfigError: there is none.
    """

    def __init__(self) -> None:
        if not torch.cuda.is_available():
            raise ConfigError(
                "bench train --device cuda needs a CUDA device, and torch "
                f"{torch.__version__} sees none here: install torch with CUDA on a machine with a "
                "card, or leave --device out to measure a small model on the CPU"
            )
        self._device = torch.device("cuda", torch.cuda.current_device())

    @property
    def device(self) -> torch.device:
        """See `Card.device`."""
        return self._device

    def limit(self, vram_bytes: int) -> None:
        """See `Card.limit`. A smaller card has no more than it has."""
        total = torch.cuda.get_device_properties(self._device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, vram_bytes / total), self._device)

    def begin_peak(self) -> None:
        """See `Card.begin_peak`."""
        gc.collect()  # an arm that is done may hang in a cycle
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(self._device)

    def peak_bytes(self) -> int:
        """See `Card.peak_bytes`: reserved by torch's allocator, so unused pieces count too."""
        return int(torch.cuda.max_memory_reserved(self._device))

    def describe(self) -> dict[str, Any]:
        """See `Card.describe`."""
        properties = torch.cuda.get_device_properties(self._device)
        return {
            "gpu": properties.name,
            "gpu_memory_bytes": properties.total_memory,
            "cuda": torch.version.cuda,
        }


def record_trace(path: Path, step: Callable[[], object], steps: int = 3) -> None:
    """Write a trace of some steps, for chrome://tracing or Perfetto: copies beside kernels."""
    from torch.profiler import ProfilerActivity, profile

    activities = [ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(ProfilerActivity.CUDA)
    step()  # what happens once only
    with profile(activities=activities) as recorded:
        for _ in range(steps):
            step()
    recorded.export_chrome_trace(str(path))
