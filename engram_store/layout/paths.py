"""Where every file of a store lies."""

import re
from dataclasses import dataclass
from pathlib import Path

_JOURNAL = re.compile(r"[0-9]{6,}")
_SNAPSHOT = re.compile(r"[0-9]{9,}\.json")


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
        names = (path.name for path in self.snapshots.iterdir())
        named = {n: int(n.removesuffix(".json")) for n in names if _SNAPSHOT.fullmatch(n)}
        # With more zeros than we write it is somebody else's file.
        return sorted(step for name, step in named.items() if self.snapshot(step).name == name)

    @property
    def journal(self) -> Path:
        """Directory of the journals of memtables that are not sealed yet."""
        return self.root / "journal"

    def journal_file(self, number: int) -> Path:
        """The journal of one memtable."""
        return self.journal / f"{number:06d}"

    def journal_files(self, up_to: int | None = None) -> list[Path]:
        """The journals that are there, by number; those of memtables up to a number."""
        if not self.journal.is_dir():
            return []
        names = sorted(n for n in (p.name for p in self.journal.iterdir()) if _JOURNAL.fullmatch(n))
        numbers = sorted({int(name) for name in names})
        files = [self.journal_file(n) for n in numbers if up_to is None or n <= up_to]
        return [path for path in files if path.name in names]

    def layer(self, layer: int) -> Path:
        """Everything of one table."""
        return self.root / "layers" / str(layer)

    def base(self, layer: int, generation: int) -> Path:
        """One base generation of a table."""
        return self.layer(layer) / "base" / f"g{generation:04d}"

    def segment(self, layer: int, number: int) -> Path:
        """One sealed segment of a table."""
        return self.layer(layer) / "segments" / f"{number:06d}"
