"""What file systems and images are made of: contents, nodes, and changes that are not synced."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

import xxhash


class Blob:
    """Content of a file, and a key that tells contents apart."""

    __slots__ = ("data", "key")

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.key: int = xxhash.xxh3_128_intdigest(data)


@dataclass(eq=False, slots=True)
class File:
    """A file whatever its names are."""

    durable: bytes
    length: int
    """As a process that is alive sees it."""
    variants: dict[tuple[int, ...], Blob] = field(default_factory=dict)
    """Contents made already, by the numbers of the changes in them."""


@dataclass(eq=False, slots=True)
class Directory:
    """A directory; names of files and directories."""

    durable: dict[str, "Node"] = field(default_factory=dict)
    now: dict[str, "Node"] = field(default_factory=dict)


Node: TypeAlias = File | Directory


@dataclass(eq=False, slots=True)
class Change:
    """An unsynced change, which may or may not outlive the host."""

    number: int
    """Grows with every change."""
    node: Node
    path: str
    """Of the file or name when it was changed."""
    kind: str
    """'data': one sector or less; 'length'; 'name'."""
    offset: int = 0
    data: bytes = b""
    length: int = 0
    name: str = ""
    target: Node | None = None
    """What the name stands for now; None: nothing."""

    def __str__(self) -> str:
        match self.kind:
            case "data":
                return f"bytes {self.offset}..{self.offset + len(self.data) - 1} of {self.path}"
            case "length":
                return f"length {self.length} of {self.path}"
        return f"the {'new' if self.target is not None else 'removed'} name {self.path}"


@dataclass(eq=False, slots=True)
class Image:
    """What recovery may find after a crash."""

    files: Mapping[str, Blob]
    """By path below the root."""
    directories: Collection[str]
    memory: Mapping[str, bytes]
    """Shared memory, by path below the root; empty after the loss of a host."""
    words: str
    """What happened, for people."""
    same_boot: bool = True
    """Whether the machine has not been booted since."""
    files_key: int = 0
    """Of files and directories; 0: not known yet."""

    @property
    def key(self) -> int:
        """Equal for equal images and, but for a chance of 2^-60 or so, for no others."""
        total = self.files_key
        if not total:
            total = sum(item_key(path, blob.key) for path, blob in self.files.items())
            total += sum(item_key(path, 1) for path in self.directories)
        for path, data in self.memory.items():
            total += item_key(path, xxhash.xxh3_128_intdigest(data)) + (2 << self.same_boot)
        return total


_item_keys: dict[tuple[str, int], int] = {}


def item_key(path: str, content: int) -> int:
    """Of a path with some content; an image's key is a sum of them."""
    known = _item_keys.get((path, content))
    if known is None:
        text = f"{content}/{path}".encode()
        known = _item_keys[path, content] = xxhash.xxh3_128_intdigest(text)
        if len(_item_keys) > 1 << 20:
            _item_keys.clear()
    return known
