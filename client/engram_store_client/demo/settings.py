"""The numbers of one demo run."""

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Self

from engram_store_client.rates import TABLE_LR_FACTOR


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """Everything that decides the result; the trainer that is killed reads it from a file."""

    seed: int = 0
    threads: int = 2
    """Of torch. The order of its sums, and so the last bits, depend on it."""

    code_chars: int = 6_000_000
    prose_chars: int = 4_000_000
    vocabulary: int = 4096

    hidden: int = 128
    blocks: int = 4
    """Decoder layers."""
    time: int = 128
    """Tokens of a sequence."""
    batch: int = 16
    base_steps: int = 700
    base_lr: float = 2e-3
    eval_sequences: int = 400
    """Held-out sequences per domain, at most."""

    layers: tuple[int, ...] = (1, 2)
    """Decoder layers that look up rows."""
    heads: int = 8
    """Hash heads of each of the two n-gram orders."""
    rows_per_head: int = 50_000
    dim: int = 32
    steps: int = 300
    lr: float = 5e-3
    """Of the gates."""
    table_factor: float = TABLE_LR_FACTOR
    """Tables learn at this multiple of `lr`, as in the Engram paper."""
    optimizer: str = "adam"
    """Of the tables. docs/demo.md has the figures of the others."""

    @property
    def snapshot_at(self) -> int:
        """The trainer that is killed keeps a checkpoint before this step, ..."""
        return self.steps // 10

    @property
    def kill_after(self) -> int:
        """... is killed after this one; the next goes back to the checkpoint, and ..."""
        return self.steps * 3 // 20

    @property
    def compare_at(self) -> int:
        """... must be what the undisturbed run was before this one."""
        return self.steps // 5

    @classmethod
    def chosen(cls, *, quick: bool, steps: int | None, seed: int, threads: int) -> Self:
        """The settings of a command line."""
        settings = cls(seed=seed, threads=threads)
        if quick:
            settings = replace(settings, **_QUICK)
        return settings if steps is None else replace(settings, steps=steps)

    def save(self, path: Path) -> None:
        """Write a file for `load`."""
        path.write_text(json.dumps(asdict(self), indent=2))

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read what `save` wrote."""
        values = json.loads(path.read_text())
        return cls(**{**values, "layers": tuple(values["layers"])})


_QUICK: dict[str, Any] = {
    "code_chars": 600_000,
    "prose_chars": 400_000,
    "vocabulary": 1024,
    "hidden": 64,
    "blocks": 3,
    "time": 64,
    "batch": 8,
    "base_steps": 60,
    "eval_sequences": 64,
    "heads": 4,
    "rows_per_head": 5_000,
    "steps": 40,
}
"""Every phase runs; the effect is small."""
