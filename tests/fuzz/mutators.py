"""Mutations that keep an input's structure, so that they reach what lies behind the first check."""

import json
import random
from collections.abc import Callable
from typing import Any

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import DecodeError, Message

from tests.fuzz.target import Mutator

SEPARATOR = b"\n%%\n"
"""Between the parts of an input that stands for several files."""
_NUMBERS = (
    0,
    1,
    -1,
    7,
    255,
    2**31 - 1,
    2**31,
    2**32,
    2**53,
    2**60,
    2**63 - 1,
    2**63,
    2**64,
    10**30,
)
_VALUES: tuple[Any, ...] = (
    *_NUMBERS,
    10**400,
    -(2**63) - 1,
    0.5,
    1.0,
    1e308,
    float("inf"),
    float("nan"),
    True,
    False,
    None,
    "",
    "0",
    "rows",
    "a\0b",
    "../x",
    "\ud800",
    "\N{ARABIC-INDIC DIGIT THREE}",
    "x" * 300,
    [],
    {},
    [[]],
    {"": 0},
)
_MAX_BYTES = 1 << 16


def mutate_bytes(data: bytes, rng: random.Random) -> bytes:
    """Flip, overwrite, insert, remove or repeat a few bytes."""
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4))):
        at = rng.randrange(len(changed) + 1)
        length = rng.choice((1, 2, 4, 8, rng.randint(1, 64)))
        match rng.randrange(6):
            case 0 if changed:
                changed[at % len(changed)] ^= 1 << rng.randrange(8)
            case 1:
                number = rng.choice(_NUMBERS) % 2**64
                changed[at : at + 8] = number.to_bytes(8, "little")
            case 2:
                changed[at:at] = rng.randbytes(length)
            case 3:
                del changed[at : at + length]
            case 4:
                changed[at:at] = changed[at : at + length] * rng.choice((1, 2, 100))
            case _:
                changed[at : at + length] = rng.choice((b"\0", b"\xff")) * length
    return bytes(changed[:_MAX_BYTES])


def mutate_json(data: bytes, rng: random.Random) -> bytes:
    """Change values, keys and nesting of a JSON text; one that is none is changed as bytes."""
    try:
        document = json.loads(data)
    except (ValueError, RecursionError):
        return mutate_bytes(data, rng)
    if rng.randrange(40) == 0:
        return b"[" * 5_000 + data + b"]" * 5_000
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        document = _change(document, rng)
    try:
        return json.dumps(document).encode()[:_MAX_BYTES]
    except (ValueError, RecursionError):
        return data


def _change(node: Any, rng: random.Random) -> Any:
    """A copy of a JSON value with a change somewhere in it."""
    if not isinstance(node, dict | list) or not node or rng.randrange(8) == 0:
        return _replacement(node, rng)
    if isinstance(node, dict):
        key = rng.choice(list(node))
        match rng.randrange(12):
            case 0:
                return {k: v for k, v in node.items() if k != key}
            case 1:
                return {**node, rng.choice(("extra", "engram_store", "")): rng.choice(_VALUES)}
            case _:
                return {**node, key: _change(node[key], rng)}
    at = rng.randrange(len(node))
    match rng.randrange(12):
        case 0:
            return node[:at] + node[at + 1 :]
        case 1:
            return node[:at] + [node[at]] * rng.choice((2, 3, 100)) + node[at + 1 :]
        case _:
            return [*node[:at], _change(node[at], rng), *node[at + 1 :]]


def _replacement(node: Any, rng: random.Random) -> Any:
    """Another value, often one near it."""
    if isinstance(node, bool) or rng.randrange(3):
        return rng.choice(_VALUES)
    if isinstance(node, int):
        near = (node + 1, node - 1, -node, node * 2, str(node), node << 40)
        return rng.choice((*near, float(node)) if abs(node) < 2**53 else near[:3])
    if isinstance(node, str):
        return rng.choice((node + "0", node[1:], node.upper(), [node], node + "\0"))
    return [node] if rng.randrange(2) else rng.choice(_VALUES)


def mutate_parts(*mutators: Mutator) -> Mutator:
    """Each part of an input (see `SEPARATOR`) has its own mutator; one part is changed."""

    def mutate(data: bytes, rng: random.Random) -> bytes:
        parts = split(data, len(mutators))
        at = rng.randrange(len(mutators))
        parts[at] = mutators[at](parts[at], rng)
        return SEPARATOR.join(parts)

    return mutate


def split(data: bytes, count: int) -> list[bytes]:
    """The parts of an input, empty where they are missing."""
    parts = data.split(SEPARATOR, count - 1)
    return parts + [b""] * (count - len(parts))


def mutate_message(kind: Callable[[], Message]) -> Mutator:
    """Change fields of a protobuf message, whatever their depth."""

    def mutate(data: bytes, rng: random.Random) -> bytes:
        message = kind()
        try:
            message.ParseFromString(data)
        except DecodeError:
            return mutate_bytes(data, rng)
        for _ in range(rng.choice((1, 1, 2, 3))):
            _change_field(message, rng)
        return message.SerializeToString()[:_MAX_BYTES]

    return mutate


def _change_field(message: Message, rng: random.Random) -> None:
    present = [entry for entry, _ in message.ListFields()]
    entries = present if present and rng.randrange(4) else list(message.DESCRIPTOR.fields)
    if not entries:
        return
    entry: Any = rng.choice(entries)
    value: Any = getattr(message, entry.name)
    if rng.randrange(10) == 0:
        message.ClearField(entry.name)
    elif _is_map(entry):
        key = rng.choice((0, 1, 2, -1, 2**31 - 1))
        value[key] = _scalar(entry.message_type.fields_by_name["value"], None, rng)
    elif entry.is_repeated:
        _change_repeated(entry, value, rng)
    elif entry.type == FieldDescriptor.TYPE_MESSAGE:
        value.SetInParent()
        _change_field(value, rng)
    else:
        setattr(message, entry.name, _scalar(entry, value, rng))


def _is_map(entry: Any) -> bool:
    kind = entry.message_type
    return kind is not None and kind.GetOptions().map_entry


def _change_repeated(entry: Any, values: Any, rng: random.Random) -> None:
    if entry.type == FieldDescriptor.TYPE_MESSAGE:
        _change_field(values.add(), rng)
    elif values and rng.randrange(2):
        values[rng.randrange(len(values))] = _scalar(entry, values[0], rng)
    else:
        values.append(_scalar(entry, None, rng))


def _scalar(entry: Any, value: Any, rng: random.Random) -> Any:
    """A value for a field: an odd one of its type, or the old one changed."""
    match entry.cpp_type:
        case FieldDescriptor.CPPTYPE_STRING if entry.type == FieldDescriptor.TYPE_BYTES:
            return mutate_bytes(value or b"", rng)
        case FieldDescriptor.CPPTYPE_STRING:
            return _text(value or "", rng)
        case FieldDescriptor.CPPTYPE_BOOL:
            return bool(rng.randrange(2))
        case FieldDescriptor.CPPTYPE_DOUBLE | FieldDescriptor.CPPTYPE_FLOAT:
            return rng.choice((0.0, -1.0, 1e-300, 1e308, float("inf"), float("nan")))
        case FieldDescriptor.CPPTYPE_ENUM:
            return rng.choice((0, 1, 2, 3, 99))
        case FieldDescriptor.CPPTYPE_INT32:
            return rng.choice((0, 1, -1, 2, 2**31 - 1, -(2**31)))
        case FieldDescriptor.CPPTYPE_UINT32:
            return rng.choice((0, 1, 2, 2**31, 2**32 - 1))
        case FieldDescriptor.CPPTYPE_INT64:
            return rng.choice((0, 1, -1, 2, 2**31, 2**60, 2**62, 2**63 - 1, -(2**63)))
        case _:
            return rng.choice((0, 1, 2, 2**31, 2**60, 2**63, 2**64 - 1))


def _text(value: str, rng: random.Random) -> str:
    """JSON stays JSON: descriptions travel as text in messages."""
    if value[:1] in ("{", "["):
        return mutate_json(value.encode(), rng).decode(errors="replace")
    words = ("", "<i8", "<f4", "<u2", "|b1", "O", "<i4,<i4", "\0", "Exception", "x" * 500, "{}")
    if rng.randrange(2):
        return rng.choice(words)
    return mutate_bytes(value.encode(), rng).decode(errors="ignore")


def mutate_lines(*words: str) -> Mutator:
    """Exchange, repeat and remove the lines of a text, and put these words in."""

    def mutate(data: bytes, rng: random.Random) -> bytes:
        lines = data.split(b"\n")
        at = rng.randrange(len(lines))
        match rng.randrange(5):
            case 0:
                lines[at] = rng.choice(words).encode(errors="surrogateescape")
            case 1:
                lines.insert(at, rng.choice(words).encode(errors="surrogateescape"))
            case 2:
                del lines[at]
            case 3:
                lines[at] = str(rng.choice(_VALUES)).encode(errors="replace")
            case _:
                lines[at] = mutate_bytes(lines[at], rng)
        return b"\n".join(lines)[:_MAX_BYTES]

    return mutate
