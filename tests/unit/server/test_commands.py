"""`engram-store config show` and `serve`, as far as nothing is served."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from engram_store.cli import main


def run(*arguments: object) -> int:
    """Run a command line in this process; returns its exit code."""
    with pytest.raises(SystemExit) as end:
        main([str(argument) for argument in arguments])
    return int(end.value.code or 0)


def test_config_show_tells_every_value_and_its_origin(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As JSON and as a table; nothing is made."""
    file = tmp_path / "store.toml"
    file.write_text('tcp = "127.0.0.1:7070"\ninsecure = true\n')
    monkeypatch.setenv("ENGRAM_STORE_FOLD_RATIO", "3")
    arguments = ("config", "show", tmp_path / "a.engram", "--config", file, "--max-sessions", 2)

    assert run(*arguments, "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert run(*arguments) == 0
    table = capsys.readouterr().out

    assert report["tcp"] == {"value": "127.0.0.1:7070", "origin": "file"}
    assert report["fold_ratio"] == {"value": 3.0, "origin": "ENGRAM_STORE_FOLD_RATIO"}
    assert report["max_sessions"] == {"value": 2, "origin": "--max-sessions"}
    assert report["socket"]["value"] == str(tmp_path / "a.engram" / "run" / "store.sock")
    assert report["socket"]["origin"] == "default"
    assert all(setting in table for setting in report)
    assert not (tmp_path / "a.engram").exists()


def test_tls_files_are_not_touched_by_looking(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Shown as they are given; only `serve` reads them, and refuses before it makes anything."""
    files = ("--tls-cert", "a.pem", "--tls-key", "a.key", "--tls-client-ca", tmp_path / "ca.pem")
    arguments = (tmp_path, "--tcp", "0.0.0.0:7070", *files)

    assert run("config", "show", *arguments, "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert run("serve", *arguments) == 2
    message = capsys.readouterr().err

    assert report["tls_cert"] == {"value": "a.pem", "origin": "--tls-cert"}
    assert report["tls_client_ca"]["value"] == str(tmp_path / "ca.pem")
    assert report["session_bytes"] == {"value": 4 << 30, "origin": "default"}
    assert f"tls_client_ca: {tmp_path / 'ca.pem'} cannot be read: No such file" in message
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("content", "part"),
    [
        ("tcp = ", "cannot be read"),
        ("max_session = 3", "did you mean max_sessions?"),
        ("[serve]\ntcp = 'x'", "unknown setting 'serve'"),
        ("a = " + "[" * 5_000, "nested too deeply"),
        (None, "No such file"),
    ],
)
def test_a_bad_configuration_file_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str | None, part: str
) -> None:
    """Exit code 2 and one sentence."""
    file = tmp_path / "store.toml"
    if content is not None:
        file.write_text(content)

    assert run("serve", tmp_path / "a.engram", "--config", file) == 2
    assert part in capsys.readouterr().err


def test_a_directory_without_a_store_is_not_served(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit code 3, and nothing is made there. One that is empty is: stores can be made in it."""
    (tmp_path / "notes.txt").touch()
    for directory in (tmp_path, tmp_path / "absent"):
        assert run("serve", directory) == 3
        assert "no store here" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_serving_without_grpc_names_what_to_install(tmp_path: Path) -> None:
    """The configuration can be shown all the same."""
    code = "import sys; sys.modules['grpc'] = None\nfrom engram_store.cli import main; main()"
    command = [sys.executable, "-c", code]

    served = subprocess.run([*command, "serve", "x"], capture_output=True, text=True, cwd=tmp_path)
    shown = subprocess.run([*command, "config", "show", "x"], capture_output=True, text=True)

    assert served.returncode == 2
    assert "pip install 'engram-store[server]'" in served.stderr
    assert shown.returncode == 0, shown.stderr
