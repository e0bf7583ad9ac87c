"""Pins: small files that anybody may put beside the snapshots, and what is done relying on them."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from engram_store.errors import (
    ConfigError,
    SnapshotMismatchError,
    StoreFileError,
)
from engram_store.layout.disk import Disk
from engram_store.layout.documents import encode_document
from engram_store.layout.files import remove_tree
from engram_store.layout.manifest import read_manifest
from engram_store.layout.pins import (
    NEWEST,
    Pin,
    check_pin_name,
    pin_file,
    pin_names,
    pins_by_step,
    read_pin,
    read_pins,
    remove_pin,
    snapshot_name,
    write_pin,
)
from engram_store.layout.snapshots import counted_steps, locate_snapshot, remove_snapshot
from tests.fuzz.mutators import (
    SEPARATOR,
    mutate_bytes,
    mutate_json,
    mutate_lines,
    mutate_parts,
    split,
)
from tests.fuzz.samples import metadata, store_files
from tests.fuzz.target import Target
from tests.fuzz.targets.documents import sealed

_SEALED, _AS_IT_IS, _LINK, _DIRECTORY, _NO_DIRECTORY, _PIPE = range(6)
"""What lies under the pin's name, by the input's first byte; `_NO_DIRECTORY`: what should
hold pins is a link to nothing."""
_STORE_ID = "0123456789abcdef" * 2


def _check_pin(data: bytes) -> None:
    """One pin. Whoever removes snapshots learns of it, or that it cannot be read."""
    paths = store_files().paths
    kind, name, content = split(data, 3)
    what, file_name = (kind or b"\0")[0] % 6, name.decode(errors="surrogateescape")
    path = pin_file(paths, file_name)
    if "/" in file_name or "\0" in file_name or not 0 < len(os.fsencode(path.name)) < 200:
        return
    try:
        _put(path, what, content)
        _check_names(file_name)
        listed = file_name in pin_names(paths)
        _check_reading(listed=listed)
        assert what != _NO_DIRECTORY, "nobody was told that the pins are gone"
        if listed:
            _check_moving(file_name)
    finally:
        remove_tree(path.parent, Disk())


def _put(path: Path, what: int, content: bytes) -> None:
    if what == _NO_DIRECTORY:
        path.parent.symlink_to("nowhere")
        return
    path.parent.mkdir()
    if what == _SEALED:
        path.write_bytes(sealed(content)[0])
    elif what == _AS_IT_IS:
        path.write_bytes(content)
    elif what == _LINK:
        path.symlink_to(os.fsdecode(content.partition(b"\0")[0][:200] or b"x"))
    elif what == _DIRECTORY:
        path.mkdir()
    else:
        os.mkfifo(path)


def _check_names(name: str) -> None:
    """What can be pinned is never taken for a step."""
    with contextlib.suppress(ConfigError):
        found = snapshot_name(name)
        assert found == (int(name) if isinstance(found, int) else name)
    with contextlib.suppress(ConfigError):
        check_pin_name(name)
        assert snapshot_name(name) == name != NEWEST


def _check_reading(*, listed: bool) -> None:
    """Left out if that is asked for; otherwise told, and then no snapshot is removed."""
    store = store_files()
    paths = store.paths
    kept = read_pins(paths, _STORE_ID, skip_damaged=True)
    whole = paths.snapshot(0).read_bytes()
    try:
        pins = read_pins(paths, _STORE_ID)
    except StoreFileError:
        assert not kept
        with contextlib.suppress(StoreFileError):
            remove_snapshot(paths, _STORE_ID, 0, Disk())
            raise AssertionError("a snapshot was removed, and it may be pinned") from None
        assert paths.snapshot(0).read_bytes() == whole
        raise
    assert pins == kept
    assert len(pins) == listed, "a pin was overlooked"
    for pin in pins:
        assert type(pin.step) is int
        assert pin.step >= 0
        assert isinstance(pin.digest, str)
        with contextlib.suppress(SnapshotMismatchError, StoreFileError):
            steps = counted_steps(paths)
            manifest, ref = locate_snapshot(paths, store.metadata, steps, pin.name)
            assert (manifest.step, ref.digest) == (pin.step, pin.digest)
    if 0 in pins_by_step(pins):
        assert not remove_snapshot(paths, _STORE_ID, 0, Disk())
    assert paths.snapshot(0).read_bytes() == whole


def _check_moving(name: str) -> None:
    """A readable pin can be moved, and taken away."""
    paths = store_files().paths
    moved = Pin(name=name, step=0, digest=read_manifest(paths, 0)[1])
    write_pin(paths, _STORE_ID, moved, Disk())
    assert read_pin(paths, _STORE_ID, name) == moved
    remove_pin(paths, _STORE_ID, name, Disk())
    assert not pin_names(paths)


def _pins() -> Iterator[bytes]:
    assert metadata().store_id == _STORE_ID
    digest = read_manifest(store_files().paths, 0)[1]
    content = {"store_id": _STORE_ID, "name": "best", "step": 0, "snapshot": digest}
    best = encode_document("pin", content)[0]
    yield SEPARATOR.join((b"\0", b"best", best))
    for kind in range(6):
        yield SEPARATOR.join((bytes([kind]), b"best", best))
    for change in (
        {"step": 0.0},
        {"step": True},
        {"step": 2**63},
        {"snapshot": ["ab"]},
        {"snapshot": "a\0b"},
        {"store_id": "another"},
        {"name": "other"},
    ):
        changed = encode_document("pin", {**content, **change})[0]
        yield SEPARATOR.join((b"\0", b"best", changed))
    for name in (b"newest", b"7", b"a.json", b"x" * 64, b"x" * 65, b"a\xff", b".hidden"):
        named = encode_document("pin", {**content, "name": name.decode(errors="replace")})[0]
        yield SEPARATOR.join((b"\0", name, named))
    yield SEPARATOR.join((bytes([_LINK]), b"best", b"best.json"))
    yield SEPARATOR.join((bytes([_LINK]), b"best", b"../../CURRENT.json"))


TARGETS = (
    Target(
        name="pin",
        check=_check_pin,
        seeds=_pins,
        allowed=(StoreFileError,),
        mutate=mutate_parts(
            mutate_bytes, mutate_lines("newest", "7", "best", "..", "\udcff"), mutate_json
        ),
    ),
)
