"""A commented file to begin with, made from the schema."""

import textwrap
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import Any, get_args, get_type_hints

from engram_store_client.runs.settings import RunSettings

_WIDTH = 88
_HEAD = """\
# A training run: engram-store train THIS_FILE
#   --check           print the memory plan and stop
#   --set a.b=value   set a key from the command line
"""
_SHOWN = {"create", "lora"}
"""Sections that may be left out, shown all the same; lora as a comment."""


def template_text() -> str:
    """YAML with every key, its meaning, and its default or an example."""
    return _HEAD + "\n".join(_section(RunSettings, "")) + "\n"


def _section(kind: Any, indent: str) -> Iterator[str]:
    hints = get_type_hints(kind)
    for field in fields(kind):
        inner = _inner(hints[field.name])
        if not indent:
            yield ""
        if inner is None:
            yield from _entry(field, indent)
            continue
        yield from _comment(field.metadata.get("doc") or inner.__doc__, indent)
        off = "# " if field.name == "lora" else ""
        yield f"{off}{indent}{field.name}:"
        yield from (off + line for line in _section(inner, indent + "  "))


def _inner(hint: Any) -> Any:
    """The dataclass of a section; None: a plain key."""
    for kind in (hint, *get_args(hint)):
        if is_dataclass(kind):
            return kind
    return None


def _entry(field: Any, indent: str) -> Iterator[str]:
    value = field.metadata["example"]
    yield from _comment(field.metadata["doc"], indent)
    if isinstance(value, dict) and value:
        yield f"{indent}{field.name}:"
        yield from (f"{indent}  {name}: {_yaml(inner)}" for name, inner in value.items())
    else:
        yield f"{indent}{field.name}: {_yaml(value)}"


def _comment(text: str, indent: str) -> list[str]:
    return [f"{indent}# {line}" for line in textwrap.wrap(text, _WIDTH - len(indent))]


def _yaml(value: Any) -> str:
    """A value as YAML in one line."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict):
        return "{}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_yaml, value)) + "]"
    return str(value) if not isinstance(value, str) or value.isidentifier() else f'"{value}"'
