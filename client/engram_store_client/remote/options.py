"""Who a trainer is to a store process, and how long it waits for it."""

import hashlib
import secrets
from dataclasses import dataclass
from math import isfinite

from engram_store.errors import ConfigError

_SECONDS = ("deadline_seconds", "work_seconds", "reconnect_seconds", "connect_seconds")


@dataclass(frozen=True, kw_only=True, slots=True)
class RemoteOptions:
    """Options of one session. Time without a connection counts for `reconnect_seconds` only."""

    store: str = ""
    """Which of the process's stores; empty: the only one."""
    deadline_seconds: float = 60.0
    """For an answer that takes the store no work."""
    work_seconds: float = 600.0
    """For rows, commits and snapshots: disk, memory and other ranks decide."""
    reconnect_seconds: float = 60.0
    """How long a lost store may stay away before waiting calls fail."""
    connect_seconds: float = 10.0
    """How long `connect` waits for a store that does not answer yet."""
    shared_memory: bool = True
    """Whether rows and gradients may travel in shared memory, where the store is on this host."""
    job: str | None = None
    """A name that all ranks of one training run share, and no other run; None: this session
    trains alone."""
    rank: int = 0
    """Which part of every step comes from here; gradients are summed in the order of ranks."""
    world_size: int = 1
    """How many ranks bring a part of every step."""

    def __post_init__(self) -> None:
        """Raises: ConfigError."""
        for name in _SECONDS:
            value = getattr(self, name)
            if not (isfinite(value) and value >= 0):
                raise ConfigError(f"{name} must be finite and not negative, got {value}")
        if not 0 <= self.rank < self.world_size:
            raise ConfigError(
                f"rank {self.rank} of world_size {self.world_size}; ranks count from 0"
            )
        if self.world_size > 1 and not self.job:
            raise ConfigError(
                f"world_size is {self.world_size}, so the ranks need a common name: pass job=..., "
                "the same everywhere and new for every run"
            )

    def session_id(self) -> str:
        """32 hexadecimal digits: of the job, or random."""
        if self.job is None:
            return secrets.token_hex(16)
        return hashlib.sha256(self.job.encode()).hexdigest()[:32]
