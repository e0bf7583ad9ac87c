"""Importing a package loads no more than it says: each in a fresh interpreter."""

import importlib
import subprocess
import sys

import pytest


def modules_after(statement: str) -> set[str]:
    """Top-level modules loaded by a statement in a fresh interpreter."""
    report = "import sys; print(*sorted({name.partition('.')[0] for name in sys.modules}))"
    command = [sys.executable, "-c", f"{statement}; {report}"]
    return set(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split())


@pytest.mark.parametrize(
    ("package", "unwanted"),
    [
        ("engram_store", {"torch", "grpc", "zarr", "tokenizers", "transformers", "numba"}),
        ("engram_store_server.commands", {"torch", "transformers", "grpc", "numba"}),
        ("engram_store_server.app", {"torch", "transformers"}),
        ("engram_store_client", {"torch", "transformers", "grpc"}),
    ],
)
def test_importing_a_package_loads_nothing_heavy(package: str, unwanted: set[str]) -> None:
    """Neither torch nor grpc nor zarr in the core; no torch in the server; commands are lazy."""
    loaded = modules_after(f"import {package}")
    assert package.partition(".")[0] in loaded
    assert not loaded & unwanted


def test_training_needs_neither_torch_nor_grpc() -> None:
    """Also once everything behind `engram_store.open` is loaded."""
    loaded = modules_after("import engram_store.store, engram_store.testing")
    assert not loaded & {"torch", "grpc", "zarr", "tokenizers", "transformers"}


@pytest.mark.parametrize(
    "module",
    [
        "engram_store",
        "engram_store.engine",
        "engram_store.optimizers",
        "engram_store.recipes",
        "engram_store.testing",
        "engram_store_client",
    ],
)
def test_public_names_are_sorted_and_there(module: str) -> None:
    """Constants, then classes, then functions, each in order: as the linter sorts them."""
    names = importlib.import_module(module).__all__
    assert list(names) == sorted(names, key=lambda n: (not n.isupper(), n[0].islower(), n))
    assert len(set(names)) == len(names)
    if module != "engram_store_client":
        assert all(hasattr(importlib.import_module(module), name) for name in names)
