"""Where every file of a store lies."""

import re
from dataclasses import dataclass
from pathlib import Path

_SNAPSHOT = re.compile(r"\d{9,}\.json")


@dataclass(frozen=True, slots=True)
class StorePaths:
    """Names inside one store directory."""

    root: Path

    @property
    def group(self) -> Path:
        """Zarr v3 group metadata: format version, recipe, tables, fingerprint."""
        return self.root / "zarr.json"

    @property
    def token_map(self) -> Path:
        """Zarr array: compressed id of each raw id."""
        return self.root / "token_map"

    @property
    def current(self) -> Path:
        """The working manifest: what a store that was killed continues from."""
        return self.root / "CURRENT.json"

    @property
    def lock(self) -> Path:
        """Locked (flock) while a process has the store open for training."""
        return self.root / "LOCK"

    @property
    def snapshots(self) -> Path:
        """Directory of snapshot manifests."""
        return self.root / "snapshots"

    def snapshot(self, step: int) -> Path:
        """Manifest of the snapshot at a step."""
        return self.snapshots / f"{step:09d}.json"

    def snapshot_steps(self) -> list[int]:
        """Steps that have a snapshot, ascending."""
        if not self.snapshots.is_dir():
            return []
        return sorted(
            int(path.stem) for path in self.snapshots.iterdir() if _SNAPSHOT.fullmatch(path.name)
        )

    def layer(self, layer: int) -> Path:
        """Everything of one table."""
        return self.root / "layers" / str(layer)

    def base(self, layer: int, generation: int) -> Path:
        """One base generation of a table."""
        return self.layer(layer) / "base" / f"g{generation:04d}"

    def segment(self, layer: int, number: int) -> Path:
        """One sealed segment of a table."""
        return self.layer(layer) / "segments" / f"{number:06d}"
