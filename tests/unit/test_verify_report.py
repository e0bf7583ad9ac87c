"""What verify says: who is affected, what to do (and that it works), the command line."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import engram_store
from engram_store.cli import main
from engram_store.errors import StoreNotFoundError
from engram_store.layout.verify import Damage, FileKind, VerifyReport
from tests.damage import (
    STEPS,
    changed,
    files_of,
    flip,
    make_store_with_history,
    rows_of_block,
    verify,
)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A store with everything that can be damaged; tests put back what they change."""
    path = tmp_path_factory.mktemp("verify") / "a.engram"
    make_store_with_history(path)
    yield path
    assert verify(path).ok, "a test left the store damaged"


# ---------------------------------------------------------------------- what is affected


def damages_of(path: Path, file: str) -> tuple[VerifyReport, Damage]:
    with changed(path / file, flip(40)):
        report = verify(path)
    (damage,) = report.damages
    return report, damage


def test_a_damage_names_the_snapshots_that_need_the_file(path: Path) -> None:
    """Segment 1 went into the fold; segment 3 came after it."""
    report, damage = damages_of(path, "layers/1/segments/000001/rows")
    assert (damage.working, damage.snapshots) == (False, (1, 2))
    assert report.sound_snapshots == (0, 3, 4)
    assert "the store itself is not" in report.advice(damage)

    report, damage = damages_of(path, "layers/1/segments/000003/rows")
    assert (damage.working, damage.snapshots) == (True, (3, 4))
    assert f"restore {path} 2`" in report.advice(damage)


def test_without_a_sound_snapshot_only_a_backup_helps(path: Path) -> None:
    """Nothing is promised that would not work."""
    with (
        changed(path / "layers/1/base/g0001/rows/c/0/0", flip(5)),
        changed(path / "layers/1/segments/000003/rows", flip(5)),
    ):
        report = verify(path)

    assert report.sound_snapshots == ()
    advice = [report.advice(damage) for damage in report.damages if damage.working]
    assert advice
    assert all("no snapshot is free" in text for text in advice)


def test_a_damaged_description_leaves_the_manifests_checked(path: Path) -> None:
    """What cannot be checked without it is said."""
    with (
        changed(path / "zarr.json", flip(200)),
        changed(path / "snapshots" / "000000001.json", flip(100)),
    ):
        report = verify(path)

    assert [damage.file for damage in report.damages] == ["zarr.json", "snapshots/000000001.json"]
    assert report.store_id is None
    assert any("were not checked" in note for note in report.notes)


def test_following_the_advice_for_a_damaged_working_manifest(path: Path, tmp_path: Path) -> None:
    """The newest snapshot in its place: the store opens at that step with its rows."""
    copy = tmp_path / "copy.engram"
    shutil.copytree(path, copy)
    with engram_store.open(path) as store:
        expected = store.read_rows(1, np.arange(4_000, dtype=np.int32))
    (copy / "CURRENT.json").write_bytes(b"{")

    report = verify(copy)
    (damage,) = report.damages
    assert f"copy snapshots/{STEPS:09d}.json over it" in report.advice(damage)
    shutil.copy(copy / "snapshots" / f"{STEPS:09d}.json", copy / "CURRENT.json")

    assert verify(copy).ok
    with engram_store.open(copy, "train") as store:
        assert store.step == STEPS
        np.testing.assert_array_equal(
            store.read_rows(1, np.arange(4_000, dtype=np.int32)), expected
        )


def test_following_the_advice_for_a_lost_snapshot(path: Path, tmp_path: Path) -> None:
    """Only the one at a closed store's step is missed; the working manifest says the same."""
    copy = tmp_path / "copy.engram"
    shutil.copytree(path, copy)
    newest = copy / "snapshots" / f"{STEPS:09d}.json"
    content = newest.read_bytes()
    newest.unlink()

    report = verify(copy)
    (damage,) = report.damages
    assert "copy CURRENT.json there" in report.advice(damage)
    shutil.copy(copy / "CURRENT.json", newest)

    assert verify(copy).ok
    assert newest.read_bytes() == content


@pytest.mark.parametrize("lost", [False, True])
def test_following_the_advice_for_damaged_rows(
    path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], lost: bool
) -> None:
    """Back to the snapshot that is named, also where a missing file keeps the store shut."""
    copy = tmp_path / "copy.engram"
    shutil.copytree(path, copy)
    file = copy / "layers" / "1" / "segments" / "000004" / "rows"
    data = bytearray(file.read_bytes())
    data[0] ^= 1
    file.write_bytes(data)
    if lost:
        file.unlink()

    report = verify(copy)
    assert f"engram-store restore {copy} 3" in report.advice(report.damages[0])
    code = run("restore", copy, 3)
    if code:
        assert lost
        shutil.copy(copy / "snapshots" / "000000003.json", copy / "CURRENT.json")
        assert run("restore", copy, 3) == 0

    capsys.readouterr()
    assert verify(copy).ok
    assert engram_store.inspect(copy).step == 3


# ---------------------------------------------------------------------- no store, and the CLI


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as end:
        main([str(argument) for argument in arguments])
    return int(end.value.code or 0)


def test_what_is_no_store_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing there, an empty directory, somebody else's Zarr group; exit code 3."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "zarr").mkdir()
    (tmp_path / "zarr" / "zarr.json").write_text('{"zarr_format": 3, "node_type": "group"}')
    for name in ("absent", "empty", "zarr"):
        with pytest.raises(StoreNotFoundError, match="no store here"):
            verify(tmp_path / name)
        assert run("verify", tmp_path / name) == 3
    assert "no store here" in capsys.readouterr().err


def test_the_command_names_damage_for_people_and_programs(
    path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit code 0 or 1; one line that sums up, then where, what, who needs it, what to do."""
    assert run("verify", path) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(f"{len(files_of(path))} files, ")
    assert line.endswith("GB/s): no damage")

    file = "layers/2/segments/000003/state"
    with changed(path / file, flip(70_000)):
        assert run("verify", path) == 1
        summary, where, problem, needed, advice = capsys.readouterr().out.splitlines()
        assert run("verify", path, "--json") == 1
        data = json.loads(capsys.readouterr().out)

    _, rows = rows_of_block(path, file, 1)
    assert summary.endswith(": 1 damage")
    assert where == (
        f"damage: {file}, block 1 (layer 2, {len(rows)} rows between {min(rows):,} and "
        f"{max(rows):,})"
    )
    assert problem.strip() == "does not match its checksum"
    assert needed.strip() == "needed by the store as it is now and the snapshots at 3, 4"
    assert f"engram-store restore {path} 2" in advice
    (damage,) = data["damages"]
    assert (damage["file"], damage["block"], damage["layer"]) == (file, 1, 2)
    assert (damage["rows"]["first"], damage["rows"]["count"]) == (min(rows), len(rows))
    assert (data["ok"], data["sound_snapshots"]) == (False, [0, 1, 2])
    assert damage["advice"] == advice.strip()


def test_the_documentation_names_every_kind_of_file() -> None:
    """docs/format.md, section verify."""
    text = (Path(__file__).parents[2] / "docs" / "format.md").read_text("utf-8")
    section = text.split("\n## verify\n")[1].split("\n## ")[0]
    assert all(str(kind) in section for kind in FileKind)
