"""Finding the vector files of a directory and running the checkers of their kinds.

Nothing passes in silence: a file that no checker knows, that cannot be read, or in which nothing
was compared counts as a miss.
"""

from collections.abc import Callable, Iterable, Mapping
from importlib.metadata import entry_points
from pathlib import Path
from types import MappingProxyType
from typing import Final, TypeAlias

from engram_store.conformance.comparison import Comparison
from engram_store.conformance.hashing import (
    check_deepseek,
    check_engram,
    check_peft,
    check_qwen,
)
from engram_store.conformance.releases import check_releases
from engram_store.conformance.report import Report
from engram_store.conformance.tensors import check_quantization, check_tensor_files
from engram_store.conformance.updates import check_sparse_optim
from engram_store.conformance.vocabulary import check_normalizer
from engram_store.errors import ConfigError

Checker: TypeAlias = Callable[[Path], Iterable[Comparison]]
"""Makes the comparisons of one vector file."""

CHECKERS: Final[Mapping[str, Checker]] = MappingProxyType(
    {
        "normalizer": check_normalizer,
        "recipe_a": check_engram,
        "recipe_p": check_peft,
        "recipe_b": check_deepseek,
        "recipe_c": check_qwen,
        "real_release": check_releases,
        "quant": check_quantization,
        "sparse_optim": check_sparse_optim,
        "tensor_files": check_tensor_files,
    }
)
"""By kind, which is also how the names of such files begin."""

PLUGIN_GROUP: Final = "engram_store.conformance"
"""Entry points named after a kind; each takes the directory and checks all files of the kind."""
_PLUGIN_KINDS = ("gating",)
"""Kinds that are known here but only checked by a plugin."""
_AUXILIARY = "tokenizer"
"""Other files refer to these."""


class _NotCheckableError(Exception):
    """What a checker needs is not installed."""


def run(directory: Path | str) -> Report:
    """Check every vector file of a directory; the README of tests/golden describes them.

    Raises:
        ConfigError: the directory does not exist or holds no vector files.
    """
    directory = Path(directory)
    comparisons: list[Comparison] = []
    not_checked: dict[str, str] = {}
    for kind, paths in _vector_files(directory).items():
        try:
            comparisons += _check_kind(kind, paths, directory)
        except _NotCheckableError as reason:
            not_checked[kind] = str(reason)
    return Report(tuple(comparisons), not_checked)


def _vector_files(directory: Path) -> dict[str, list[Path]]:
    """The vector files by kind; a file of no known kind is a kind of its own."""
    if not directory.is_dir():
        raise ConfigError(f"{directory} is not a directory of vector files")
    plugins = (entry.name for entry in entry_points(group=PLUGIN_GROUP))
    prefixes = sorted({*CHECKERS, *_PLUGIN_KINDS, *plugins}, key=len, reverse=True)
    found: dict[str, list[Path]] = {}
    for path in sorted(directory.iterdir()):
        is_vector = path.suffix in (".json", ".safetensors")
        if is_vector and not path.name.startswith(_AUXILIARY):
            kind = next((prefix for prefix in prefixes if path.name.startswith(prefix)), path.stem)
            found.setdefault(kind, []).append(path)
    if not found:
        raise ConfigError(f"{directory} holds no vector files (*.json, *.safetensors)")
    return found


def _check_kind(kind: str, paths: list[Path], directory: Path) -> list[Comparison]:
    """All comparisons of the files of one kind. Raises: _NotCheckableError."""
    if kind in CHECKERS:
        return [
            comparison
            for path in paths
            for comparison in _guarded(kind, [path], CHECKERS[kind], path)
        ]
    for entry in entry_points(group=PLUGIN_GROUP):
        if entry.name == kind:
            try:
                checker = entry.load()
            except ModuleNotFoundError as error:
                raise _NotCheckableError(f"needs {error.name}") from error
            return _guarded(kind, paths, checker, directory)
    if kind in _PLUGIN_KINDS:
        raise _NotCheckableError("no checker for them is installed")
    return [Comparison(kind, path.name, "file", False, "of no known kind") for path in paths]


def _guarded(kind: str, paths: list[Path], checker: Checker, argument: Path) -> list[Comparison]:
    """The comparisons of one call, and a miss for each file that ends it or goes unmentioned."""
    comparisons: list[Comparison] = []
    try:
        # One at a time: what was compared before an error stays in the report.
        for comparison in checker(argument):
            comparisons.append(comparison)  # noqa: PERF402
    except Exception as error:  # a file can be wrong in every way; the report tells which
        detail = f"cannot be read as a file of this kind: {type(error).__name__}: {error}"
        comparisons.append(Comparison(kind, argument.name, "file", False, detail))
        return comparisons
    mentioned = {Path(comparison.file).stem for comparison in comparisons}
    return comparisons + [
        Comparison(kind, path.name, "file", False, "nothing in it was compared")
        for path in paths
        if path.stem not in mentioned
    ]
