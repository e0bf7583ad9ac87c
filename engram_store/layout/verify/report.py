"""What a verification found, and what to do about it."""

import enum
from dataclasses import asdict, dataclass
from typing import Any


class FileKind(enum.StrEnum):
    """What a damaged file is, which decides what it costs."""

    GROUP = "store description"
    """`zarr.json` of the store: recipe and tables."""
    TOKEN_MAP = "token map"  # noqa: S105 - tokens of a language
    WORKING = "working manifest"
    SNAPSHOT = "snapshot manifest"
    PIN = "pin"
    """The name of a snapshot."""
    ZARR = "Zarr metadata"
    DESCRIPTION = "description"
    """`base.json`, `segment.json`."""
    CHECKSUMS = "checksums"
    DATA = "data"
    """Chunk files of base arrays; row ids, rows and state of segments."""
    MEMTABLE = "memtable"


@dataclass(frozen=True, kw_only=True, slots=True)
class Rows:
    """Which rows of a table a damage concerns."""

    count: int
    """How many; 0 where only padding beyond the table's last row is concerned."""
    first: int | None = None
    """The lowest row id; None where it cannot be told, because row ids are what is damaged."""
    last: int | None = None
    """The highest. A base file holds every row between the two, a segment a few of them."""
    first_slot: int | None = None
    """In a segment: the first slot. It is that of `count` consecutive ones."""

    def __str__(self) -> str:
        if not self.count:
            return "padding after the last row"
        if self.first is None:
            return f"{self.count:,} rows"
        if self.first_slot is None:
            return f"rows {self.first:,} to {self.last:,}"
        return f"{self.count:,} rows between {self.first:,} and {self.last:,}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Damage:
    """One damage: a file, or consecutive blocks of one."""

    file: str
    """Below the store's directory; the whole path of a memtable, which may lie elsewhere."""
    kind: FileKind
    problem: str
    """What is wrong, to be read after the file's name."""
    block: int | None = None
    """First damaged block of 64 KiB; None: the file as a whole."""
    blocks: int = 0
    """Consecutive damaged blocks; 0: the file as a whole."""
    layer: int | None = None
    """The table; None: all of them, or none."""
    rows: Rows | None = None
    """None where no row is concerned, or all of all tables."""
    working: bool = False
    """Whether the store as it is now needs the file."""
    snapshots: tuple[int, ...] = ()
    """Steps of the snapshots that need the file, ascending."""

    @property
    def where(self) -> str:
        """File, blocks, table and rows, for people."""
        text = self.file
        if self.block is not None and self.blocks > 1:
            text += f", blocks {self.block:,} to {self.block + self.blocks - 1:,}"
        elif self.block is not None:
            text += f", block {self.block:,}"
        if self.layer is not None:
            text += f" (layer {self.layer}" + (f", {self.rows}" if self.rows else "") + ")"
        return text

    @property
    def needed_by(self) -> str:
        """Who needs the file, for people."""
        steps = ", ".join(f"{step:,}" for step in self.snapshots[-6:])
        if len(self.snapshots) > 6:
            steps = f"..., {steps} ({len(self.snapshots):,} in all)"
        parts = ["the store as it is now"] * self.working
        if self.snapshots:
            parts.append(f"the snapshot{'s' * (len(self.snapshots) > 1)} at {steps}")
        return " and ".join(parts)


@dataclass(frozen=True, kw_only=True, slots=True)
class VerifyReport:
    """What `verify_store` found."""

    path: str
    store_id: str | None
    """None where the store's description is damaged."""
    files: int
    """Files checked."""
    read_bytes: int
    """Bytes whose checksum was computed; a file with several names counts once."""
    seconds: float
    snapshots: tuple[int, ...]
    """Steps of the snapshots that were checked, ascending."""
    damages: tuple[Damage, ...]
    notes: tuple[str, ...]
    """What is no damage: files that nothing needs, and what could not be checked."""

    @property
    def ok(self) -> bool:
        """Whether nothing is damaged."""
        return not self.damages

    @property
    def bytes_per_second(self) -> float:
        """Of the whole verification."""
        return self.read_bytes / max(self.seconds, 1e-9)

    @property
    def sound_snapshots(self) -> tuple[int, ...]:
        """Steps of the snapshots that no damage touches, ascending."""
        lost = {step for damage in self.damages for step in damage.snapshots}
        return tuple(step for step in self.snapshots if step not in lost)

    def advice(self, damage: Damage) -> str:
        """What to do about one of the damages: one sentence."""
        backup = "restore the file from a backup"
        newest = max(self.sound_snapshots, default=None)
        match damage.kind:
            case FileKind.GROUP | FileKind.TOKEN_MAP:
                return f"{backup}, or from any copy of this store: it never changes"
            case FileKind.ZARR:
                return f"{backup}, or from another base generation of the table; no row is lost"
            case FileKind.SNAPSHOT if damage.problem.startswith("is missing"):
                return f"{backup}, or copy CURRENT.json there: the store is closed at that step"
            case FileKind.SNAPSHOT if not damage.snapshots:
                return "restore the newest snapshot's file from a backup"
            case FileKind.SNAPSHOT:
                return f"{backup}, or remove it: that snapshot is lost, nothing else"
            case FileKind.PIN:
                return (
                    f"{backup}, or pin the snapshot again (`engram-store pin --move`), or remove "
                    "the name (`engram-store unpin`); no row is lost"
                )
            case FileKind.MEMTABLE:
                return (
                    "take a snapshot if the process that trains is alive; if it was killed, the "
                    "next opening goes back to the newest snapshot"
                )
            case FileKind.WORKING if newest is not None:
                return (
                    f"{backup}, or close the store and copy {_snapshot(newest)} over it to go "
                    f"on from step {newest:,}"
                )
        if not damage.working:
            return f"{backup}; without it these snapshots are lost, the store itself is not"
        if newest is None:
            return f"{backup}; no snapshot is free of damage"
        return (
            f"{backup}, or go back with `engram-store restore {self.path} {newest}`; if that "
            f"cannot open the store, copy {_snapshot(newest)} over CURRENT.json"
        )

    def to_json(self) -> dict[str, Any]:
        """Everything, as JSON types."""
        damages = [
            {**asdict(damage), "kind": str(damage.kind), "advice": self.advice(damage)}
            for damage in self.damages
        ]
        return {
            **asdict(self),
            "ok": self.ok,
            "bytes_per_second": self.bytes_per_second,
            "sound_snapshots": self.sound_snapshots,
            "damages": damages,
        }


def _snapshot(step: int) -> str:
    return f"snapshots/{step:09d}.json"
