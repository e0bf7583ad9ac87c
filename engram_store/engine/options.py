"""How an engine runs."""

import math
from dataclasses import dataclass, field
from pathlib import Path

from engram_store.errors import ConfigError
from engram_store.layout.disk import Disk


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineOptions:
    """How a store runs. None of it decides what is stored."""

    memory_bytes: int | None = None
    """All that the store may use: shared memory, windows ahead, indexes, and the page cache of its
    files. None: what the limit of the machine or the cgroup leaves to this process."""
    overlay_bytes: int | None = None
    """Shared memory of both memtables; None chooses by the memory limit. More means fewer bytes
    written, because a row updated often is sealed once."""
    memtable_dir: Path | None = None
    """Directory for memtables; None: /dev/shm, or the data directory where that is small."""
    fold_ratio: float = 1.0
    """Fold when a table's segments reach this multiple of its base; below 1 rewrites too much."""
    fold_bytes_per_second: float | None = None
    """How much folds and merges read and write; None: as fast as they can."""
    scrub_bytes_per_second: float = 0.0
    """How fast files in use are read again and again to find damages; 0: never."""
    durability: str = "snapshot"
    """When applied steps outlive the host: `snapshot`, `group(MS)` or `step`."""
    keep_snapshots: int | None = None
    """How many of the newest snapshots stay when one is made, beside the pinned; None: all."""
    lookahead_bytes: int | None = None
    """Memory of windows that are hashed and gathered ahead of their step; None: an eighth of the
    memory limit, at most 2 GiB."""
    staleness: int = 0
    """By how many steps rows may lag behind; 0 is exact."""
    disk: Disk = field(default_factory=Disk)
    """What changes files: the real thing, or one that records or refuses."""

    def __post_init__(self) -> None:
        """Raises: ConfigError: a speed that is none."""
        if not self.fold_ratio > 0:
            raise ConfigError(
                f"fold_ratio is {self.fold_ratio!r}; it is a number above 0, such as 1: fold when "
                "segments are as large as the base"
            )
        for name, value in (
            ("memory_bytes", self.memory_bytes),
            ("lookahead_bytes", self.lookahead_bytes),
            ("staleness", self.staleness),
        ):
            if value is not None and (type(value) is not int or value < 0):
                raise ConfigError(f"{name} is {value!r}; it is a whole number, 0 or more")
        fold, scrub = self.fold_bytes_per_second, self.scrub_bytes_per_second
        if fold is not None and not 0 < fold < math.inf:
            raise ConfigError(
                f"fold_bytes_per_second is {fold!r}; it is a number above 0, or None: no limit"
            )
        if not 0 <= scrub < math.inf:
            raise ConfigError(f"scrub_bytes_per_second is {scrub!r}; it is a number, 0 for never")
