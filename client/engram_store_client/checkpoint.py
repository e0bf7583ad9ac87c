"""A trainer's checkpoint: the gates, and which snapshot of which store belongs to them.

`engram_dense.safetensors` holds everything, its metadata included, so that one rename makes a
checkpoint complete; `engram_config.json` repeats the metadata for people.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialize
from torch import Tensor

from engram_store.errors import (
    ConfigError,
    FingerprintMismatchError,
    ForeignFileError,
    ShapeError,
    SnapshotMismatchError,
    StoreNotFoundError,
    UnknownVersionError,
)
from engram_store.layout.disk import Disk
from engram_store.layout.documents import parse_json, text, whole
from engram_store.layout.files import make_directory, replace_file
from engram_store.layout.metadata import StoreMetadata
from engram_store.session import Session, SnapshotRef
from engram_store_client.gates import Gate, GateConfig

DENSE_FILE = "engram_dense.safetensors"
CONFIG_FILE = "engram_config.json"
LIBRARY = "engram-store"
_VERSION = 1
_KEY = "engram_config"


@dataclass(frozen=True, kw_only=True, slots=True)
class Description:
    """What a checkpoint says about itself."""

    name: str
    """Of the memory."""
    snapshot: SnapshotRef
    step: int
    """The next step to commit."""
    gates: Mapping[int, GateConfig]
    """By layer."""
    meaning: Mapping[str, Any]
    """`StoreMetadata.fingerprint_fields` of the store: recipe and tables."""
    fingerprint: str
    exported: str | None
    """Where the tables are, relative to the checkpoint; None: in a store somewhere else."""
    location: str | None
    """Where that store was, as an absolute path; None: not known, or not told."""

    def to_json(self) -> dict[str, Any]:
        """What is written."""
        return {
            "library_name": LIBRARY,
            "version": _VERSION,
            "name": self.name,
            "step": self.step,
            "store": asdict(self.snapshot),
            "tables": {"exported": self.exported, "location": self.location},
            "gates": {str(number): config.to_json() for number, config in self.gates.items()},
            "fingerprint": self.fingerprint,
            "recipe": dict(self.meaning),
        }

    @classmethod
    def from_json(cls, described: Mapping[str, Any]) -> "Description":
        """Inverse of `to_json`. Raises: AttributeError, KeyError, TypeError, ValueError."""
        snapshot = SnapshotRef(**described["store"])
        text(snapshot.store_id, "store_id")
        whole(snapshot.step, "step of the snapshot")
        text(snapshot.digest, "digest")
        tables = described["tables"]
        for name in ("exported", "location"):
            if tables[name] is not None:
                text(tables[name], name)
        gates = described["gates"].items()
        return cls(
            name=text(described["name"], "name"),
            snapshot=snapshot,
            step=whole(described["step"], "step"),
            gates={int(number): GateConfig.from_json(config) for number, config in gates},
            meaning=dict(described["recipe"].items()),
            fingerprint=text(described["fingerprint"], "fingerprint"),
            exported=_inside(tables["exported"]),
            location=tables["location"],
        )


def _inside(relative: str | None) -> str | None:
    """A path that stays inside of the checkpoint's directory. Raises: ValueError."""
    if relative is not None:
        path = PurePosixPath(relative)
        if path.is_absolute() or ".." in path.parts or not path.parts:
            raise ValueError(f"tables at {relative!r} are not inside of the checkpoint")
    return relative


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """What a directory holds."""

    path: Path
    """Of the file with everything."""
    description: Description
    tensors: Mapping[str, Tensor]

    @property
    def snapshot(self) -> SnapshotRef:
        """Of the tables."""
        return self.description.snapshot

    @property
    def step(self) -> int:
        """The next step to commit."""
        return self.description.step

    def states_for(self, gates: Mapping[int, Gate]) -> dict[int, dict[str, Tensor]]:
        """State dicts of these gates, by layer; nothing is changed.

        Raises:
            ConfigError: it was made with other layers or other gates.
            ShapeError: a tensor has another shape than the gate's.
        """
        ours = {number: _arithmetic(gate.config) for number, gate in gates.items()}
        theirs = {n: _arithmetic(config) for n, config in self.description.gates.items()}
        if ours != theirs:
            raise ConfigError(f"{self.path} was made for {theirs}; the attached gates are {ours}")
        return {number: _state(self.tensors, number, gate) for number, gate in gates.items()}


def describe(
    session: Session,
    gates: Mapping[int, Gate],
    snapshot: SnapshotRef,
    *,
    name: str,
    step: int,
    exported: str | None = None,
    location: str | None = None,
) -> Description:
    """What a checkpoint of these gates and that snapshot of a store says about itself."""
    metadata = _metadata(session)
    return Description(
        name=name,
        snapshot=snapshot,
        step=step,
        gates={number: gate.config for number, gate in gates.items()},
        meaning=metadata.fingerprint_fields(),
        fingerprint=metadata.fingerprint,
        exported=exported,
        location=location,
    )


def _metadata(session: Session) -> StoreMetadata:
    return StoreMetadata(store_id=session.store_id, recipe=session.recipe, tables=session.tables)


def save(directory: Path, gates: Mapping[int, Gate], description: Description) -> None:
    """Write a checkpoint.

    Raises: DiskFullError, OSError; an older checkpoint there is still complete then.
    """
    disk = Disk()
    make_directory(directory, disk)
    tensors = {
        f"{number}.{name}": tensor.detach().cpu().contiguous()
        for number, gate in gates.items()
        for name, tensor in gate.state_dict().items()
    }
    described = json.dumps(description.to_json(), indent=2)
    replace_file(directory / DENSE_FILE, serialize(tensors, {_KEY: described}), disk)
    replace_file(directory / CONFIG_FILE, f"{described}\n".encode(), disk)


def read(directory: Path) -> Checkpoint:
    """Read a checkpoint.

    Raises:
        StoreNotFoundError, ForeignFileError, UnknownVersionError: no usable checkpoint.
    """
    path = directory / DENSE_FILE
    config, tensors = _open(path)
    try:
        if config["version"] != _VERSION:
            raise UnknownVersionError(
                path, f"has format {config['version']!r:.100}, this engram-store reads {_VERSION}"
            )
        description = Description.from_json(config)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        if isinstance(error, UnknownVersionError):
            raise
        raise ForeignFileError(
            path,
            f"is no checkpoint of save_pretrained(); its description lacks something: {error}",
        ) from error
    return Checkpoint(path, description, tensors)


def check_meaning(checkpoint: Checkpoint, session: Session) -> None:
    """Refuse a store whose rows mean something else than those the gates were trained with.

    Raises:
        FingerprintMismatchError: names every differing field with both values.
    """
    # As JSON, because that is what the checkpoint went through.
    mine = json.loads(json.dumps(_metadata(session).fingerprint_fields()))
    theirs = checkpoint.description.meaning
    differences = {
        field: (mine.get(field), theirs.get(field))
        for field in sorted(mine.keys() | theirs.keys())
        if mine.get(field) != theirs.get(field)
    }
    if differences:
        raise FingerprintMismatchError("the checkpoint", differences)


def restore_tables(checkpoint: Checkpoint, session: Session) -> None:
    """Take the store back to the checkpoint's snapshot.

    Raises:
        SnapshotMismatchError: the checkpoint belongs to another store, which this one was not
            exported from at that snapshot, or its snapshot is gone. Nothing changed.
    """
    try:
        # The store decides: one that was exported from the very snapshot has another id.
        session.restore(checkpoint.snapshot)
    except SnapshotMismatchError as error:
        if checkpoint.snapshot.store_id == session.store_id:
            raise
        raise SnapshotMismatchError(
            f"the checkpoint belongs to store {checkpoint.snapshot.store_id!r} (snapshot at step "
            f"{checkpoint.snapshot.step}), this is store {session.store_id!r} at step "
            f"{session.step}; nothing was changed. Connect to the store it was saved with, or to "
            f"one exported from that snapshot ({error})"
        ) from error


def _arithmetic(config: GateConfig) -> GateConfig:
    """The same for gates that compute the same: how they started does not matter."""
    plain = GateConfig(kind=config.kind, hidden_size=1, row_width=1)
    return replace(config, identity_init=plain.identity_init, init=plain.init)


def _open(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    if not path.is_file():
        raise StoreNotFoundError(path, "no checkpoint here; save_pretrained() writes one")
    try:
        with safe_open(path, framework="pt") as file:
            config = parse_json((file.metadata() or {})[_KEY])
            return config, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, KeyError, ValueError) as error:
        raise ForeignFileError(path, f"is no checkpoint of save_pretrained(): {error}") from error


def _state(tensors: Mapping[str, Tensor], number: int, gate: Gate) -> dict[str, Tensor]:
    """One gate's tensors, checked against the gate."""
    state = {}
    for name, ours in gate.state_dict().items():
        full = f"{number}.{name}"
        if full not in tensors:
            raise ConfigError(f"the checkpoint has no tensor {full!r}")
        if tensors[full].shape != ours.shape:
            raise ShapeError(full, tensors[full].shape, f"{tuple(ours.shape)}, as the gate has it")
        state[name] = tensors[full]
    return state
