"""What there is: VRAM, memory and disk of this machine, or as much as somebody says."""

import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from engram_store.engine.memory import memory_limit_bytes
from engram_store.errors import ConfigError

_UNITS = {
    "": 1,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "tb": 10**12,
    "kib": 1 << 10,
    "mib": 1 << 20,
    "gib": 1 << 30,
    "tib": 1 << 40,
}


def parse_size(text: str | int, name: str = "a size") -> int:
    """Bytes of '24GB', '24 GiB', '500MB' or a number. GB is 10^9 bytes, GiB is 2^30.

    Raises: ConfigError.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]i?b|b?)\s*", str(text).lower())
    if match is None:
        raise ConfigError(f"{name} is {text!r}; give bytes with a unit, such as 24GB or 22.5GiB")
    return int(float(match[1]) * _UNITS[match[2].removesuffix("b") and match[2]])


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """Bytes that may be used; None: nobody knows, and nothing is refused for it."""

    vram: int | None = None
    memory: int | None = None
    disk: int | None = None

    @classmethod
    def of_machine(cls, directory: str | Path = ".") -> "Limits":
        """What this machine has; disk is what is free where a directory is, or will be."""
        return cls(
            vram=smallest_card_bytes(), memory=memory_limit_bytes(), disk=free_bytes(directory)
        )


def free_bytes(directory: str | Path) -> int:
    """Free bytes of the disk on which a directory is, or would be made."""
    place = Path(directory).absolute()
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free


def smallest_card_bytes() -> int | None:
    """VRAM of the smallest card that the driver's own tool sees; None: it sees none."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    command = [tool, "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    try:
        text = subprocess.run(command, check=True, capture_output=True, text=True, timeout=10)  # noqa: S603
    except (OSError, subprocess.SubprocessError):
        return None
    cards = [int(line) for line in text.stdout.split() if line.isdecimal()]
    return min(cards) << 20 if cards else None
