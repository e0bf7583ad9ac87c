"""Which base generations and segments the manifests of a store need at this moment."""

import contextlib
import os
from dataclasses import dataclass, field

from engram_store.errors import EngramStoreError, ForeignFileError, StoreFileError
from engram_store.layout.manifest import Manifest, check_layers, check_owner, read_manifest
from engram_store.layout.paths import StorePaths
from engram_store.layout.pins import pin_file, pin_names, read_pin
from engram_store.layout.verify.blocks import BlockReader
from engram_store.layout.verify.description import BROKEN, Description, problem_of
from engram_store.layout.verify.report import Damage, FileKind


@dataclass(frozen=True, slots=True)
class Part:
    """A base generation or a segment, as manifests name it.

    With the digest: after a restore another generation may have the number of a forgotten one.
    """

    layer: int
    number: int
    """Of the generation or the segment."""
    digest: str
    slots: int | None = None
    """Of a segment; None: it is a base generation."""


@dataclass(kw_only=True, slots=True)
class Needed:
    """What the manifests name, and the damages of the manifests themselves."""

    working: Manifest | None = None
    """The working manifest; None where it is damaged."""
    steps: tuple[int, ...] = ()
    """Snapshots that count, ascending, damaged ones included."""
    parts: dict[Part, tuple[bool, set[int]]] = field(default_factory=dict)
    """Whether the working manifest names it, and which snapshots do."""
    pins: tuple[str, ...] = ()
    """Names of snapshots, damaged ones included."""
    damages: list[Damage] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def add(self, manifest: Manifest, step: int | None) -> None:
        """All that a manifest names; `step` is that of a snapshot."""
        named = set() if step is None else {step}
        for table in manifest.tables:
            parts = [Part(table.layer, table.generation, table.base_digest)]
            parts += [Part(table.layer, s.number, s.digest, s.slots) for s in table.segments]
            for part in parts:
                working, steps = self.parts.get(part, (False, set()))
                self.parts[part] = working or step is None, steps | named


def read_needed(paths: StorePaths, description: Description | None, reader: BlockReader) -> Needed:
    """Read every manifest of a store. Raises nothing for damage.

    Args:
        paths: of the store.
        description: None where it is damaged; then parts are not to be had.
        reader: counts what is read.
    """
    needed = Needed()
    # Listed first: a snapshot is published after the working manifest of its step.
    listed = set(paths.snapshot_steps())
    always: set[int] = set()
    needed.working = _read(paths, description, None, needed, reader)
    if needed.working is not None:
        newest = needed.working.step
        needed.notes += [
            f"snapshots/{step:09d}.json is newer than the store: a restore went back past it, and "
            "the next opening for training removes it"
            for step in sorted(listed)
            if step > newest
        ]
        listed = {step for step in listed if step <= newest}
        # Closing makes a snapshot of its step; others may be removed at any time.
        always = {newest} if needed.working.closed else set()
    steps = []
    for step in sorted(listed | always):
        before = len(needed.damages)
        _read(paths, description, step, needed, reader)
        if step not in always and not os.path.lexists(paths.snapshot(step)):
            del needed.damages[before:]  # removed since it was listed
        else:
            steps.append(step)
    needed.steps = tuple(steps)
    if not steps:
        problem = "holds no snapshot; a store always has one"
        needed.damages.append(Damage(file="snapshots", kind=FileKind.SNAPSHOT, problem=problem))
    needed.pins = tuple(pin_names(paths))
    if description is not None:
        for name in needed.pins:
            _check_pin(paths, description.store_id, name, needed, reader)
    return needed


def _check_pin(
    paths: StorePaths, store_id: str, name: str, needed: Needed, reader: BlockReader
) -> None:
    """A damaged pin, and one whose snapshot is not there, becomes a damage."""
    path = pin_file(paths, name)
    try:
        reader.count(path.stat().st_size)
        pin = read_pin(paths, store_id, name)
        snapshot = paths.snapshot(pin.step)
        problem = ""
        if not snapshot.exists():
            problem = f"names the snapshot at step {pin.step}, which is not there"
        else:
            with contextlib.suppress(StoreFileError):  # a damaged manifest is a damage of its own
                if read_manifest(paths, pin.step)[1] != pin.digest:
                    problem = f"names another snapshot than the one at step {pin.step}"
    except (EngramStoreError, OSError, *BROKEN) as error:
        problem = problem_of(error, path)
    if problem and os.path.lexists(path):  # otherwise it was removed meanwhile
        file = str(path.relative_to(paths.root))
        needed.damages.append(Damage(file=file, kind=FileKind.PIN, problem=problem, working=True))


def _read(
    paths: StorePaths,
    description: Description | None,
    step: int | None,
    needed: Needed,
    reader: BlockReader,
) -> Manifest | None:
    """Read one manifest and add what it names; a damaged one becomes a damage."""
    path = paths.current if step is None else paths.snapshot(step)
    try:
        reader.count(path.stat().st_size)
        manifest, _ = read_manifest(paths, step)
        if step is not None and (not manifest.closed or manifest.memtables):
            raise ForeignFileError(path, "is a working manifest under the name of a snapshot")
        if description is not None:
            check_owner(path, manifest, description.store_id)
            check_layers(path, manifest, description.specs)
            needed.add(manifest, step)
    except (EngramStoreError, OSError, *BROKEN) as error:
        needed.damages.append(
            Damage(
                file=str(path.relative_to(paths.root)),
                kind=FileKind.WORKING if step is None else FileKind.SNAPSHOT,
                problem=problem_of(error, path),
                working=step is None,
                snapshots=() if step is None else (step,),
            )
        )
        return None
    return manifest
