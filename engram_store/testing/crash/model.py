"""A file system in memory that knows what is durable and what may still be lost.

Content and names are separate, as POSIX has it: `sync` of a file makes its bytes and its length
durable but not its name; `sync_directory` makes names durable but not what they name. A rename is
a new name and a removed one, each of which may be durable without the other.
"""

import copy
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from engram_store.testing.crash.nodes import (
    Blob,
    Change,
    Directory,
    File,
    Image,
    Node,
    item_key,
)
from engram_store.testing.disk import Operation

SECTOR_BYTES = 512
"""What a disk writes whole or not at all."""
_TREES = 1000
"""Remembered between two syncs: each is as large as the store has files."""


@dataclass(eq=False, slots=True)
class _Tree:
    """What a choice of names leads to, with durable content."""

    files: dict[str, Blob]
    directories: list[str]
    paths: dict[int, list[str]]
    """By identity of the file."""
    key: int


class FileSystem:
    """Everything below a root directory, changed by recorded operations.

    Files that were there at first are durable. Files opened by `open_shared` are shared memory:
    they live as long as the host does.

    Args:
        root: operations have absolute paths below it.
        store: the directory below it that is on a disk; all else is shared memory.
    """

    def __init__(self, root: Path, store: str) -> None:
        self._prefix, self._store = f"{root}/", store
        self._root = Directory()
        self._open: dict[int, tuple[File, str]] = {}
        self._next = 1
        self._trees: dict[tuple[int, ...], _Tree] = {}
        self.unsynced: list[Change] = []
        """In the order in which they were made."""
        self.memory: dict[str, bytes] = {}
        self.removed = b""
        """Content of the file that lost its last name most recently: blocks of new files may
        hold it where they were never written."""

    @classmethod
    def found(cls, root: Path, store: str, ignored: Collection[str] = ()) -> Self:
        """What is on the disk now, all of it durable; file names in `ignored` left out."""
        files, directories = {}, []
        for path in sorted((root / store).rglob("*")):
            name = str(path.relative_to(root))
            if path.is_dir():
                directories.append(name)
            elif path.name not in ignored:
                files[name] = Blob(path.read_bytes())
        return cls.of_image(root, store, Image(files, [store, *directories], {}, ""))

    @classmethod
    def of_image(cls, root: Path, store: str, image: Image) -> Self:
        """An image that became durable as it is."""
        made = cls(root, store)
        for directory in sorted(image.directories):
            made._give(directory, Directory())
        for path, blob in image.files.items():
            made._give(path, File(blob.data, len(blob.data)))
        made.memory = dict(image.memory)
        return made

    def _give(self, path: str, node: Node) -> None:
        parent, name = self._parent(path)
        parent.durable[name] = parent.now[name] = node

    def copy(self) -> Self:
        """Another one in the same state."""
        self._trees.clear()  # they tell nodes apart by identity
        return copy.deepcopy(self)

    def end_process(self) -> None:
        """Files that are open are closed; their unsynced changes stay unsynced."""
        self._open = {}

    # ------------------------------------------------------------------ operations

    def apply(self, operation: Operation) -> None:
        """Do what was recorded.

        Raises:
            ValueError: it does not fit what came before, so the record is not complete.
        """
        path = self.relative(operation.path)
        if operation.kind in ("open_shared", "store", "stored", "discard"):
            self._store_memory(path, operation)
        elif operation.kind in ("create", "write", "reserve", "truncate", "sync", "close"):
            self._change_content(path, operation)
        elif path.partition("/")[0] != self._store:
            if operation.kind == "unlink":
                self.memory.pop(path, None)
        else:
            self._change_names(path, operation)

    def relative(self, path: Path) -> str:
        """The path below the root. Raises: ValueError: it is elsewhere."""
        text = str(path)
        if not text.startswith(self._prefix):
            raise ValueError(f"{path} is not below {self._prefix}; record all of a directory")
        return text[len(self._prefix) :]

    def _store_memory(self, path: str, operation: Operation) -> None:
        if operation.kind == "open_shared":
            self.memory.setdefault(path, bytes(operation.length))
        else:
            self.memory[path] = patched(self.memory[path], operation.offset, operation.data)

    def _change_content(self, path: str, operation: Operation) -> None:
        if operation.kind == "create":
            file = File(b"", 0)
            self._open[operation.file] = file, path
            self._rename_to(path, file)
            return
        file, path = self._open[operation.file]
        match operation.kind:
            case "write":
                end = operation.offset + len(operation.data)
                if end > file.length:
                    self._add(file, path, "length", length=end)
                    file.length = end
                for start, piece in _sectors(operation.offset, operation.data):
                    self._add(file, path, "data", offset=start, data=piece)
            case "reserve" if operation.length > file.length:
                self._add(file, path, "length", length=operation.length)
                file.length = operation.length
            case "truncate":
                self._add(file, path, "length", length=operation.length)
                file.length = operation.length
            case "sync":
                file.durable = self._content(file, [c for c in self.unsynced if c.node is file])
                file.variants.clear()
                self._trees.clear()
                self.unsynced = [c for c in self.unsynced if c.node is not file]
            case "close":
                del self._open[operation.file]

    def _change_names(self, path: str, operation: Operation) -> None:
        match operation.kind:
            case "make_directory":
                self._rename_to(path, Directory())
            case "unlink" | "remove_directory":
                node = self._find(path)
                if isinstance(node, File):
                    self.removed = self._content(node, [c for c in self.unsynced if c.node is node])
                self._rename_to(path, None)
            case "link" | "rename":
                assert operation.target is not None
                node = self._find(path)
                if operation.kind == "rename":
                    self._rename_to(path, None)
                self._rename_to(self.relative(operation.target), node)
            case "sync_directory":
                directory = self._find(path)
                assert isinstance(directory, Directory)
                directory.durable = dict(directory.now)
                self._trees.clear()
                self.unsynced = [c for c in self.unsynced if c.node is not directory]
                self._forget_lost()
            case kind:
                raise ValueError(f"no operation {kind!r} is known")

    def _rename_to(self, path: str, node: Node | None) -> None:
        parent, name = self._parent(path)
        if node is None:
            del parent.now[name]
        else:
            parent.now[name] = node
        self._add(parent, path, "name", name=name, target=node)

    def _add(self, node: Node, path: str, kind: str, **more: object) -> None:
        self.unsynced.append(Change(self._next, node, path, kind, **more))  # type: ignore[arg-type]
        self._next += 1

    def _parent(self, path: str) -> tuple[Directory, str]:
        directory, _, name = path.rpartition("/")
        parent = self._find(directory) if directory else self._root
        if not isinstance(parent, Directory):
            raise TypeError(f"{directory} is not a directory")
        return parent, name

    def _find(self, path: str) -> Node:
        node: Node = self._root
        for name in path.split("/"):
            if not isinstance(node, Directory) or name not in node.now:
                raise ValueError(f"{path} is not there; the record is not complete")
            node = node.now[name]
        return node

    def _forget_lost(self) -> None:
        """Changes of what no name can lead to any more concern nobody."""
        if not self.unsynced:
            return
        reached: set[int] = set()
        names: dict[int, list[Node]] = {}
        for change in self.unsynced:
            if change.target is not None:
                names.setdefault(id(change.node), []).append(change.target)
        waiting: list[Node] = [self._root, *(file for file, _ in self._open.values())]
        while waiting:
            node = waiting.pop()
            if id(node) in reached:
                continue
            reached.add(id(node))
            if isinstance(node, Directory):
                waiting += [*node.durable.values(), *names.get(id(node), ())]
        self.unsynced = [c for c in self.unsynced if id(c.node) in reached]

    # ------------------------------------------------------------------ what a crash leaves

    def after(
        self, kept: Collection[int], memory: Mapping[str, bytes], words: str, *, stale: bool = False
    ) -> Image:
        """The files if exactly these unsynced changes became durable.

        Args:
            kept: numbers of changes.
            memory: shared memory that is left.
            words: what happened, for people.
            stale: what a file's length covers and was never written reads as `removed`, not as
                zeros.
        """
        names = []
        content: dict[int, list[Change]] = {}
        for change in self.unsynced:
            if change.number not in kept:
                continue
            if change.kind == "name":
                names.append(change)
            else:
                content.setdefault(id(change.node), []).append(change)
        tree = self._tree(names)
        files, key = tree.files, tree.key
        for identity, changes in content.items():
            file = changes[0].node
            assert isinstance(file, File)
            blob = self._variant(file, changes, stale=stale)
            for path in tree.paths.get(identity, ()):
                if files is tree.files:
                    files = dict(files)
                key += item_key(path, blob.key) - item_key(path, files[path].key)
                files[path] = blob
        return Image(files, tree.directories, memory, words, files_key=key)

    def _tree(self, names: list[Change]) -> _Tree:
        choice = tuple(change.number for change in names)
        tree = self._trees.get(choice)
        if tree is not None:
            return tree
        changes: dict[int, list[Change]] = {}
        for change in names:
            changes.setdefault(id(change.node), []).append(change)
        tree = _Tree({}, [], {}, 0)
        for path, node in self._walk("", self._root, changes):
            if isinstance(node, File):
                blob = tree.files[path] = self._variant(node, [], stale=False)
                tree.paths.setdefault(id(node), []).append(path)
                tree.key += item_key(path, blob.key)
            else:
                tree.directories.append(path)
                tree.key += item_key(path, 1)
        if len(self._trees) > _TREES:
            self._trees.clear()
        self._trees[choice] = tree
        return tree

    def _walk(
        self, prefix: str, directory: Directory, changes: Mapping[int, list[Change]]
    ) -> Iterator[tuple[str, Node]]:
        entries: Mapping[str, Node | None] = directory.durable
        if mine := changes.get(id(directory)):
            entries = dict(entries) | {change.name: change.target for change in mine}
        for name, node in entries.items():
            if node is None:
                continue
            yield prefix + name, node
            if isinstance(node, Directory):
                yield from self._walk(f"{prefix}{name}/", node, changes)

    def _variant(self, file: File, changes: list[Change], *, stale: bool) -> Blob:
        key = (int(stale and bool(changes)), *(change.number for change in changes))
        blob = file.variants.get(key)
        if blob is None:
            blob = file.variants[key] = Blob(self._content(file, changes, stale=stale))
        return blob

    def _content(self, file: File, changes: list[Change], *, stale: bool = False) -> bytes:
        content = bytearray(file.durable)
        for change in changes:
            end = change.length or change.offset + len(change.data)
            if end > len(content):
                hole = self.removed[len(content) : end] if stale else b""
                content += hole.ljust(end - len(content), b"\0")
            if change.kind == "data":
                content[change.offset : end] = change.data
            else:
                del content[change.length :]
        return bytes(content)


def patched(memory: bytes, offset: int, data: bytes) -> bytes:
    """Memory after a store."""
    return b"".join((memory[:offset], data, memory[offset + len(data) :]))


def _sectors(offset: int, data: bytes) -> Iterator[tuple[int, bytes]]:
    """Pieces of a write that lie in one sector each."""
    position = 0
    while position < len(data):
        taken = SECTOR_BYTES - (offset + position) % SECTOR_BYTES
        yield offset + position, data[position : position + taken]
        position += taken
