"""What a user installs: the built wheel, alone."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("engram_store", "engram_store_client", "engram_store_server")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("wheel")
    build = f"from hatchling.build import build_wheel; build_wheel({str(target)!r})"
    subprocess.run([sys.executable, "-c", build], cwd=ROOT, check=True, capture_output=True)
    return next(target.glob("*.whl"))


def test_the_wheel_holds_the_packages_and_nothing_else(wheel: Path) -> None:
    """Three typed packages at the top, and the licence."""
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == set(PACKAGES)
    for package in PACKAGES:
        assert f"{package}/py.typed" in names
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_the_wheel_holds_every_module(wheel: Path) -> None:
    """A package without its subpackages cannot be imported; that has happened to others."""
    names = set(zipfile.ZipFile(wheel).namelist())
    for folder, package in zip((".", "client", "server"), PACKAGES, strict=True):
        root = ROOT / folder
        for path in (root / package).rglob("*.py"):
            assert path.relative_to(root).as_posix() in names


def test_the_unpacked_wheel_creates_a_store(wheel: Path, tmp_path: Path) -> None:
    """From the wheel's own files, not from the checkout."""
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    code = (
        "import engram_store, numpy as np\n"
        "from engram_store.recipes import engram\n"
        f"assert engram_store.__file__.startswith({str(site)!r}), engram_store.__file__\n"
        "recipe = engram(token_map=np.arange(9), layers=[1], rows_per_head=50, heads=2, pad_id=0)\n"
        "engram_store.create('a.engram', recipe, dim=4)\n"
        "with engram_store.open('a.engram', 'train') as store:\n"
        "    window = store.announce(np.arange(8).reshape(1, 8), 0)\n"
        "    rows, _ = window.rows(1)\n"
        "    window.push(1, np.ones(rows.shape, np.float32))\n"
        "    print(store.commit(0, 0.1).rows)\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={"PYTHONPATH": str(site), "NUMBA_CACHE_DIR": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith("{1: ")
