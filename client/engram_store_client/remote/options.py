"""How long a trainer waits for a store process."""

from dataclasses import dataclass, fields
from math import isfinite

from engram_store.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class RemoteOptions:
    """Deadlines of one session. Time without a connection counts for `reconnect_seconds` only."""

    deadline_seconds: float = 60.0
    """For an answer that takes the store no work."""
    work_seconds: float = 600.0
    """For rows, commits and snapshots: disk and memory decide."""
    reconnect_seconds: float = 60.0
    """How long a lost store may stay away before waiting calls fail."""
    shared_memory: bool = True
    """Whether rows and gradients may travel in shared memory, where the store is on this host."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name == "shared_memory":
                continue
            if not (isfinite(value) and value >= 0):
                raise ConfigError(f"{field.name} must be finite and not negative, got {value}")
