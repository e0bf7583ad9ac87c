"""A trainer's checkpoint: the gates, and which snapshot of which store belongs to them.

`engram_dense.safetensors` holds everything, its metadata included, so that one rename makes a
checkpoint complete; `engram_config.json` repeats the metadata for people.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialize
from torch import Tensor

from engram_store.errors import (
    ConfigError,
    ForeignFileError,
    ShapeError,
    SnapshotMismatchError,
    StoreNotFoundError,
    UnknownVersionError,
)
from engram_store.layout.disk import Disk
from engram_store.layout.documents import parse_json, text, whole
from engram_store.layout.files import make_directory, replace_file
from engram_store.session import Session, SnapshotRef
from engram_store_client.gates import Gate, GateConfig

DENSE_FILE = "engram_dense.safetensors"
CONFIG_FILE = "engram_config.json"
_VERSION = 1
_KEY = "engram_config"


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """What a directory holds."""

    snapshot: SnapshotRef
    step: int
    """The next step to commit."""
    states: Mapping[int, dict[str, Tensor]]
    """State dicts of the gates, by layer."""


def save(directory: Path, gates: Mapping[int, Gate], snapshot: SnapshotRef, *, step: int) -> None:
    """Write a checkpoint.

    Raises: DiskFullError, OSError; an older checkpoint there is still complete then.
    """
    disk = Disk()
    make_directory(directory, disk)
    config = {
        "version": _VERSION,
        "step": step,
        "store": asdict(snapshot),
        "gates": {str(number): gate.config.to_json() for number, gate in gates.items()},
    }
    tensors = {
        f"{number}.{name}": tensor.detach().cpu().contiguous()
        for number, gate in gates.items()
        for name, tensor in gate.state_dict().items()
    }
    described = json.dumps(config, indent=2, sort_keys=True)
    replace_file(directory / DENSE_FILE, serialize(tensors, {_KEY: described}), disk)
    replace_file(directory / CONFIG_FILE, f"{described}\n".encode(), disk)


def read(directory: Path, gates: Mapping[int, Gate]) -> Checkpoint:
    """Read a checkpoint for these gates; nothing is changed.

    Raises:
        StoreNotFoundError, ForeignFileError, UnknownVersionError: no usable checkpoint.
        ConfigError: it was made with other layers or other gates.
        ShapeError: a tensor has another shape than the gate's.
    """
    path = directory / DENSE_FILE
    config, tensors = _open(path)
    try:
        if config["version"] != _VERSION:
            raise UnknownVersionError(
                path, f"has format {config['version']!r:.100}, this engram-store reads {_VERSION}"
            )
        snapshot, step = _snapshot_of(config["store"]), whole(config["step"], "step")
        saved = dict(config["gates"].items())
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ForeignFileError(
            path,
            f"is no checkpoint of save_pretrained(); its description lacks something: {error}",
        ) from error
    _check_gates(path, saved, gates)
    states = {number: _state(tensors, number, gate) for number, gate in gates.items()}
    return Checkpoint(snapshot, step, states)


def _snapshot_of(described: Mapping[str, Any]) -> SnapshotRef:
    """Raises: KeyError, TypeError, ValueError: not what `save` writes."""
    snapshot = SnapshotRef(**described)
    text(snapshot.store_id, "store_id")
    whole(snapshot.step, "step of the snapshot")
    text(snapshot.digest, "digest")
    return snapshot


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


def _check_gates(path: Path, saved: Mapping[str, Any], gates: Mapping[int, Gate]) -> None:
    """Refuse gates that compute something else; how they were initialised does not matter."""
    ours = {str(number): gate.config for number, gate in gates.items()}
    theirs = {number: GateConfig.from_json(config) for number, config in saved.items()}
    if {n: replace(c, identity_init=True) for n, c in ours.items()} != {
        n: replace(c, identity_init=True) for n, c in theirs.items()
    }:
        raise ConfigError(f"{path} was made for {theirs}; the attached gates are {ours}")


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
