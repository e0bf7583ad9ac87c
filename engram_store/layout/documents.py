"""JSON documents that carry their own digest: manifests and descriptions of sealed files."""

import errno
import hashlib
import json
import os
import stat
from pathlib import Path
from typing import Any

from engram_store.errors import ChecksumError, ForeignFileError, StoreFileError, UnknownVersionError

FORMAT_VERSION = 1
_MAX_BYTES = 64 << 20


def canonical(data: Any) -> bytes:
    """JSON bytes that depend on the content alone: sorted keys, no spaces."""
    return json.dumps(data, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def parse_json(data: bytes | str) -> Any:
    """A JSON text's value. Raises: ValueError, also for one nested too deeply to be ours."""
    try:
        return json.loads(data)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def read_json(path: Path) -> Any:
    """The value in a JSON file.

    Raises:
        ValueError: it is no JSON, no file, or larger than any of ours.
        FileNotFoundError, NotADirectoryError, PermissionError: it cannot be read.
    """
    try:
        found = path.stat()
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise ValueError("it is a link that leads back to itself") from None
        raise
    if not stat.S_ISREG(found.st_mode):
        raise ValueError("it is no file")  # to read a pipe would never end
    if found.st_size > _MAX_BYTES:
        raise ValueError(f"it has {found.st_size:,} bytes, more than any of ours")
    return parse_json(path.read_bytes())


def whole(value: Any, what: str, at_least: int = 0, below: int = 1 << 63) -> int:
    """A whole number of a JSON text. Raises: ValueError for others, and for true and 1.0."""
    if type(value) is not int or not at_least <= value < below:
        raise ValueError(f"{what} is {value!r:.100}, not a whole number from {at_least}")
    return value


def text(value: Any, what: str) -> str:
    """A string of a JSON text that can be a path. Raises: ValueError for others."""
    if not isinstance(value, str) or b"\0" in os.fsencode(value):
        raise ValueError(f"{what} is {value!r:.100}, not a text")
    return value


def digest_of(data: Any) -> str:
    """SHA-256 of the canonical JSON."""
    return hashlib.sha256(canonical(data)).hexdigest()


def encode_document(kind: str, content: dict[str, Any]) -> tuple[bytes, str]:
    """A readable file and its digest.

    Args:
        kind: what the document is, checked when it is read.
        content: JSON types only.
    """
    body = {"engram_store": kind, "format_version": FORMAT_VERSION, **content}
    digest = digest_of(body)
    return (json.dumps({**body, "digest": digest}, indent=1) + "\n").encode(), digest


def read_document(path: Path, kind: str) -> tuple[dict[str, Any], str]:
    """Content and digest of a document.

    Raises:
        ForeignFileError: not a document of this kind.
        UnknownVersionError: written by a newer version.
        ChecksumError: the content does not match its digest.
    """
    try:
        body = read_json(path)
    except ValueError as error:
        raise ForeignFileError(
            path, f"is not JSON ({error}); it was cut off or is foreign"
        ) from None
    except FileNotFoundError:
        raise StoreFileError(path, f"is missing; a store without its {kind} is damaged") from None
    if not isinstance(body, dict) or body.get("engram_store") != kind:
        raise ForeignFileError(path, f"is not an engram-store {kind}")
    version = body.get("format_version")
    if version != FORMAT_VERSION:
        raise UnknownVersionError(
            path,
            f"has format version {version!r}, this engram-store reads {FORMAT_VERSION}; "
            "install a newer engram-store",
        )
    digest = body.pop("digest", None)
    try:
        actual = digest_of(body)
    except (ValueError, RecursionError):  # NaN, say: JSON as Python reads it, none that we write
        actual = None
    if actual is None or digest != actual:
        raise ChecksumError(path, f"the content does not match its digest; the {kind} is damaged")
    return body, str(digest)
