"""A run's file: YAML into settings, nothing unknown, nothing twice."""

import difflib
import re
import types
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

from engram_store.errors import ConfigError
from engram_store_client.runs.settings import RunSettings

_FLOAT = re.compile(r"[-+]?(\d[\d_]*\.?\d*|\.\d+)([eE][-+]?\d+)$")
"""1e-4, which YAML 1.1 takes for a word."""


def read_settings(path: Path | str, overrides: Sequence[str] = ()) -> RunSettings:
    """Read a file.

    Args:
        path: YAML, as `engram-store train --template` prints it.
        overrides: `a.b=value`, over what the file says; values are YAML too.

    Raises:
        ConfigError: no such file, no YAML, an unknown key (with the one that was meant), a key
            that is missing, or a value that makes no sense.
    """
    file = Path(path)
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"cannot read {path}: {error}; `engram-store train --template` prints a file to begin "
            "with"
        ) from error
    data = parse_yaml(text, str(path))
    if not isinstance(data, dict):
        raise ConfigError(f"{path} holds no keys; see `engram-store train --template`")
    for override in overrides:
        _override(data, override)
    settings = build(RunSettings, data, "")
    assert isinstance(settings, RunSettings)
    return settings


def parse_yaml(text: str, name: str) -> Any:
    """A YAML document; keys that come twice are refused. Raises: ConfigError."""
    try:
        import yaml  # type: ignore[import-untyped]
    except ImportError as error:
        raise ConfigError("training needs PyYAML: pip install 'engram-store[hf]'") from error

    class Loader(yaml.SafeLoader):  # type: ignore[misc]
        """Safe, with the floats of YAML 1.2."""

        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            seen = set()
            for key_node, _ in node.value:
                key = self.construct_object(key_node, deep=True)
                if not isinstance(key, str):
                    raise ConfigError(f"{name}: {key!r} is no key; keys are words")
                if key in seen:
                    line = key_node.start_mark.line + 1
                    raise ConfigError(f"{name}: key {key!r} comes twice, again in line {line}")
                seen.add(key)
            return super().construct_mapping(node, deep)

    Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+.0123456789"))
    try:
        return yaml.load(text, Loader)  # noqa: S506 - a SafeLoader
    except yaml.YAMLError as error:
        raise ConfigError(f"{name} is no YAML: {error}") from error


def _override(data: dict[str, Any], override: str) -> None:
    """Set one key of nested maps. Raises: ConfigError."""
    path, equals, text = override.partition("=")
    names = path.strip().split(".")
    if not equals or not all(names):
        raise ConfigError(f"--set {override!r} is not of the form section.key=value")
    for name in names[:-1]:
        inner = data.get(name)
        if inner is None:
            inner = data[name] = {}
        if not isinstance(inner, dict):
            raise ConfigError(f"--set {override!r}: {name} has no keys, it is {inner!r}")
        data = inner
    data[names[-1]] = parse_yaml(text, f"--set {override!r}")


def build(kind: Any, data: Any, where: str) -> Any:
    """Settings from nested maps. Raises: ConfigError."""
    if not isinstance(data, Mapping):
        raise ConfigError(f"{where or 'the file'} is {data!r}; it takes keys and values")
    known = {field.name: field for field in fields(kind)}
    refuse_unknown(data, known, where)
    hints = get_type_hints(kind)
    values = {}
    for name, field in known.items():
        place = f"{where}.{name}" if where else name
        if name in data:
            values[name] = _value(hints[name], data[name], place)
        elif field.default is MISSING and field.default_factory is MISSING:
            raise ConfigError(f"{place} is needed: {_doc(hints[name], field)}")
    return kind(**values)


def _doc(hint: Any, field: Any) -> str:
    text = field.metadata.get("doc") or hint.__doc__ or ""
    return str(text).partition("\n")[0]


def refuse_unknown(data: Iterable[str], known: Iterable[str], where: str) -> None:
    """Raises: ConfigError: a key that there is not, with the one that was meant."""
    names = list(known)
    for name in data:
        if name in names:
            continue
        close = difflib.get_close_matches(name, names, 1, 0.6)
        meant = f"did you mean {close[0]}? " if close else ""
        section = where or "a run"
        listed = ", ".join(names) if len(names) < 30 else f"{len(names)} keys"
        raise ConfigError(f"{section} has no key {name!r}; {meant}It has {listed}")


def _value(hint: Any, value: Any, where: str) -> Any:
    """A value of the type that a key takes. Raises: ConfigError."""
    if get_origin(hint) in (Union, types.UnionType):
        inner = [part for part in get_args(hint) if part is not type(None)]
        return None if value is None else _value(inner[0], value, where)
    if is_dataclass(hint):
        return build(hint, {} if value is None else value, where)
    if get_origin(hint) is tuple:
        items = value if isinstance(value, list | tuple) else [value]
        return tuple(
            _value(get_args(hint)[0], item, f"{where}[{i}]") for i, item in enumerate(items)
        )
    if get_origin(hint) is dict:
        if not isinstance(value, dict):
            raise ConfigError(f"{where} is {value!r}; it takes keys and values")
        return value
    return _scalar(hint, value, where)


_KINDS = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}


def _scalar(kind: type, value: Any, where: str) -> Any:
    """Raises: ConfigError."""
    if kind is float and type(value) is int:
        return float(value)
    if kind is str and type(value) in (int, float):
        return str(value)  # a size without a unit, or a directory called 1
    if type(value) is not kind:
        raise ConfigError(f"{where} is {value!r}; it is {_KINDS[kind]}")
    return value
