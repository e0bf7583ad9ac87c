"""Two kinds of text that a machine with Python has anyway: code, and prose about it.

The base model learns code whose docstrings were taken out; the docstrings, with licences and
whatever documentation is installed, are the new domain that the memory has to learn.
"""

import ast
import hashlib
import os
import sysconfig
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

_SHORTEST = 400
"""Characters; shorter texts are left out."""
_HELD_OUT = 10
"""Every tenth file is held out."""
_SYSTEM = (Path("/usr/share/common-licenses"), Path("/usr/share/doc"))
_SYSTEM_NAMES = ("copyright", "readme", "news", "gpl", "lgpl", "apache", "gfdl", "mpl", "artistic")
_SYSTEM_SUFFIXES = (".txt", ".md", ".rst")
_LICENCE_NAMES = ("licen", "copying", "notice", "authors", "metadata")
_SKIPPED = {"test", "tests", "idle_test", "site-packages", "dist-packages", "pydoc_data"}

Texts = dict[str, str]
"""Text by name."""


@dataclass(frozen=True, slots=True)
class Domain:
    """Whole files, no file on both sides."""

    train: tuple[str, ...]
    held_out: tuple[str, ...]

    @property
    def files(self) -> int:
        """How many there are."""
        return len(self.train) + len(self.held_out)


def collect(code_chars: int, prose_chars: int) -> tuple[Domain, Domain]:
    """Code, and prose about it, with at most so many characters each.

    The same machine gives the same texts, in the same order.
    """
    code, docstrings = _standard_library()
    # Half of the prose is Python's own, so that machines differ less from one another.
    python = limited({**docstrings, **_topics()}, prose_chars // 2)
    installed = limited(_licences() | _system_documents(), prose_chars - _size(python))
    return _split(limited(code, code_chars)), _split({**python, **installed})


def split_docstrings(source: str) -> tuple[str, str]:
    """A module without its docstrings, and the docstrings. Raises: SyntaxError, ValueError."""
    lines = source.splitlines(keepends=True)
    docstrings = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes in somebody else's strings
        tree = ast.parse(source)
    for node in ast.walk(tree):
        if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        text = ast.get_docstring(node)
        if text is None:
            continue
        docstrings.append(text)
        place = node.body[0]
        for line in range(place.lineno - 1, place.end_lineno or place.lineno):
            lines[line] = ""
    return "".join(lines), "\n\n".join(docstrings)


def _standard_library() -> tuple[Texts, Texts]:
    """Code and docstrings of every module, tests left out."""
    root = Path(sysconfig.get_paths()["stdlib"])
    code, docstrings = Texts(), Texts()
    for path, text in _read(root, (p for p in _walk(root) if p.suffix == ".py")):
        try:
            code[path], docstrings[path] = split_docstrings(text)
        except (SyntaxError, ValueError):
            continue
    return code, docstrings


def _topics() -> Texts:
    """What `help()` says about the language; Python carries it along."""
    try:
        from pydoc_data.topics import topics
    except ImportError:
        return {}
    return {f"topic {name}": text for name, text in topics.items()}


def _licences() -> Texts:
    """Licences and descriptions of installed Python packages, and Python's own licence."""
    root = Path(sysconfig.get_paths()["stdlib"])
    texts = dict(_read(root, [root / "LICENSE.txt"]))
    for package in metadata.distributions():
        for file in package.files or ():
            if ".dist-info" in str(file) and file.name.lower().startswith(_LICENCE_NAMES):
                site = Path(str(package.locate_file("")))
                texts |= dict(_read(site, [Path(str(file.locate()))]))
    return texts


def _system_documents() -> Texts:
    """Documentation of the system's packages, where there is any."""
    texts = Texts()
    for root in _SYSTEM:
        texts |= dict(_read(root.parent, (p for p in _walk(root) if _is_document(p))))
    return texts


def _is_document(path: Path) -> bool:
    return path.suffix in _SYSTEM_SUFFIXES or path.name.lower().startswith(_SYSTEM_NAMES)


def _walk(root: Path) -> Iterator[Path]:
    """Regular files below a directory, links left out."""
    for directory, names, files in os.walk(root):
        names[:] = [name for name in names if name not in _SKIPPED]
        yield from (p for f in files if not (p := Path(directory) / f).is_symlink())


def _read(root: Path, paths: Iterable[Path]) -> Iterator[tuple[str, str]]:
    """Texts by their path below `root`; what is no UTF-8 text is left out."""
    for path in paths:
        try:
            yield str(path.relative_to(root)), path.read_text(encoding="utf-8")
        except (OSError, ValueError):
            continue


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def limited(texts: Texts, chars: int) -> Texts:
    """Texts in an order that depends on names alone, until there are `chars`; each only once."""
    chosen, seen = Texts(), set[str]()
    for name in sorted(texts, key=_digest):
        text, digest = texts[name], _digest(texts[name])
        if len(text) < _SHORTEST or digest in seen:
            continue
        if _size(chosen) >= chars:
            break
        seen.add(digest)
        chosen[name] = text
    return chosen


def _size(texts: Texts) -> int:
    return sum(map(len, texts.values()))


def _split(texts: Texts) -> Domain:
    ordered = [texts[name] for name in sorted(texts, key=_digest)]
    return Domain(
        train=tuple(text for i, text in enumerate(ordered) if i % _HELD_OUT),
        held_out=tuple(text for i, text in enumerate(ordered) if i % _HELD_OUT == 0),
    )
