"""Who may listen on a socket's path."""

import socket
from pathlib import Path

import pytest

from engram_store.errors import ConfigError
from engram_store_server.socket_path import claim_socket


def test_the_directory_is_made_private(tmp_path: Path) -> None:
    """And the path is free again afterwards."""
    path = tmp_path / "run" / "store.sock"
    with claim_socket(path), socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        assert path.parent.stat().st_mode & 0o777 == 0o700
    assert not path.exists()


@pytest.mark.parametrize("mode", [0o755, 0o710, 0o701, 0o704])
def test_a_directory_open_to_others_is_refused(tmp_path: Path, mode: int) -> None:
    """And left as it is."""
    directory = tmp_path / "run"
    directory.mkdir()
    directory.chmod(mode)
    with pytest.raises(ConfigError, match="chmod 700"), claim_socket(directory / "store.sock"):
        pass
    assert directory.stat().st_mode & 0o777 == mode
    assert not any(directory.iterdir())


def test_a_stale_socket_is_replaced(tmp_path: Path) -> None:
    """Nobody listens on what a killed process left."""
    tmp_path.chmod(0o700)
    path = tmp_path / "store.sock"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    with claim_socket(path):
        assert not path.exists()


def test_a_listening_socket_is_left_alone(tmp_path: Path) -> None:
    """Also one of another program."""
    tmp_path.chmod(0o700)
    path = tmp_path / "store.sock"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        with pytest.raises(ConfigError, match="another process listens"), claim_socket(path):
            pass
        assert path.is_socket()


def test_one_process_at_a_time_claims_a_path(tmp_path: Path) -> None:
    """Also before anybody listens."""
    path = tmp_path / "run" / "store.sock"
    with (
        claim_socket(path),
        pytest.raises(ConfigError, match="another process listens"),
        claim_socket(path),
    ):
        pass


def test_a_file_in_the_way_is_kept(tmp_path: Path) -> None:
    """It may be somebody's."""
    tmp_path.chmod(0o700)
    path = tmp_path / "store.sock"
    path.write_text("mine")
    with pytest.raises(ConfigError, match="not a socket"), claim_socket(path):
        pass
    assert path.read_text() == "mine"
