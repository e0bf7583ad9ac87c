"""What one session may take of a store process."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class SessionLimits:
    """Bounds of every session, so that one trainer can neither starve nor delay the others."""

    hello_seconds: float = 10.0
    """How long a new connection may take to say who it is, TLS included."""
    handover_seconds: float = 1.0
    """How long a new trainer waits for a stopped one to be noticed before it is refused."""
    session_bytes: int = 4 << 30
    """Memory that the open windows of one session may use: rows, gradients and look-ups."""
    open_windows: int = 1024
    """Windows that one session may have open at once."""
