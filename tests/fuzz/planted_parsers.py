"""Targets of real parsers with a bug planted in each: they show that the targets look closely."""

import json
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

from engram_store.layout.carry import Carrier
from engram_store.layout.checksums import block_checksums
from tests.fuzz.registry import TARGETS as REAL
from tests.fuzz.target import Target

Patch = Callable[[], AbstractContextManager[object]]


def _unlimited_varint(raw: bytes, at: int) -> tuple[int, int]:
    """Numbers of any length, which protobuf refuses."""
    value = shift = 0
    while True:
        digit = raw[at]
        at += 1
        value |= (digit & 0x7F) << shift
        shift += 7
        if digit < 0x80:
            return value, at


def _link_as_it_is(_self: Carrier, source: Path, target: Path) -> bool:
    os.link(source, target, follow_symlinks=False)
    return True


def _sum_only(
    self: Carrier,
    path: Path,
    named: Path,
    _length: int,
    seeds: tuple[int, int],
    _expected: Any,
    sums: list[Any],
) -> Iterator[Any]:
    """What is read is right: damage gets new checksums."""
    blocks = 0
    for piece in self._pieces(path, named):
        sums.append(block_checksums(piece, seeds[1], blocks))
        blocks += sums[-1].size
        yield piece


_ADMINISTRATION = "engram_store_client.remote.administration"
_BUGS: tuple[tuple[str, str, Patch, str], ...] = (
    # Name, target, bug, and what the report says.
    (
        "steps-of-pins-are-not-checked",
        "pin",
        lambda: mock.patch("engram_store.layout.pins.whole", lambda value, _what: value),
        "AssertionError",
    ),
    (
        "links-to-no-pins-are-overlooked",
        "pin",
        lambda: mock.patch("engram_store.layout.pins._check_directory"),
        "nobody was told that the pins are gone",
    ),
    (
        "exports-link-to-links",
        "export",
        lambda: mock.patch.object(Carrier, "_link", _link_as_it_is),
        "it needs another's files",
    ),
    (
        "exports-carry-damage-on",
        "export",
        lambda: mock.patch.object(Carrier, "_checked", _sum_only),
        "damage was carried on",
    ),
    (
        "numbers-in-chunks-have-no-end",
        "chunks",
        lambda: mock.patch("engram_store.chunks._read_varint", _unlimited_varint),
        "AssertionError",
    ),
    (
        "sizes-of-snapshots-are-cut-off",
        "snapshot-list",
        lambda: mock.patch("engram_store.layout.usage.whole", lambda value, _what: int(value)),
        "OverflowError",
    ),
    (
        "texts-are-lists-of-names",
        "garbage-report",
        lambda: mock.patch("engram_store.engine.garbage.texts", lambda value, _what: tuple(value)),
        "it says something else",
    ),
    (
        "pairs-are-a-record",
        "administration",
        lambda: mock.patch(f"{_ADMINISTRATION}._record", lambda _, text: dict(json.loads(text))),
        "not what the call promises",
    ),
)


def _with_bug(name: str, target: Target, patch: Patch) -> Target:
    def check(data: bytes) -> None:
        with patch():
            target.check(data)

    return replace(target, name=name, check=check)


TARGETS = {name: _with_bug(name, REAL[target], patch) for name, target, patch, _ in _BUGS}
FOUND = {name: says for name, _, _, says in _BUGS}
"""What the report of each says."""
