"""Mutual TLS between real processes: who is let in, what the others are told, and renewal."""

import shutil
import socket
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest

import engram_store
from engram_store.errors import ConfigError, ProtocolError
from engram_store.recipes import Recipe
from engram_store_client import connect
from engram_store_client.transport import process_address
from tests.certificates import CLIENT, EXPIRED, Authority, Issued, put_in_place
from tests.integration.serving import ENGRAM_STORE, SECONDS, SERVING, StoreProcess, health
from tests.pairs import DIM, INITIAL, MakeStore, Pair, make_oracle, memtable_directory


@dataclass(frozen=True)
class Secured:
    """A store process that takes the certificates of one CA, and is itself known by another."""

    process: StoreProcess
    servers: Authority
    trainers: Authority
    trainer: Issued

    @property
    def address(self) -> str:
        assert self.process.tcp is not None
        return self.process.tcp

    def files(self, shown: Issued | None = None) -> dict[str, Any]:
        """Options of `connect`, as they should be."""
        shown = shown or self.trainer
        return {"tls_ca": self.servers.cert, "tls_cert": shown.cert, "tls_key": shown.key}


def serve_options(own: Issued, authority: Authority, tcp: str = "127.0.0.1:0") -> list[str]:
    """The command line of TLS."""
    given = {"tcp": tcp, "tls-cert": own.cert, "tls-key": own.key, "tls-client-ca": authority.cert}
    return [str(part) for name, value in given.items() for part in (f"--{name}", value)]


@pytest.fixture(scope="module")
def secured(tmp_path_factory: pytest.TempPathFactory, recipe: Recipe) -> Iterator[Secured]:
    folder = tmp_path_factory.mktemp("tls")
    servers, trainers = Authority(folder, "servers"), Authority(folder, "trainers")
    path = folder / "a.engram"
    engram_store.create(path, recipe, dim=DIM, initial=INITIAL)
    own = servers.issue("127.0.0.1", "store.example")
    process = StoreProcess(path, *serve_options(own, trainers))
    yield Secured(process, servers, trainers, trainers.issue())
    process.kill()
    store_id = engram_store.inspect(path).metadata.store_id
    shutil.rmtree(memtable_directory(path, store_id), ignore_errors=True)


# ---------------------------------------------------------------------- who is let in


def test_a_trainer_with_a_certificate_trains(secured: Secured, recipe: Recipe) -> None:
    """Rows and updates are the oracle's; the Unix socket of the same process needs none."""
    with connect(secured.address, **secured.files()) as session:
        assert session.transport == "messages"  # type: ignore[attr-defined]
        Pair(session, make_oracle(recipe, INITIAL)).train(1)
    with connect(f"unix:{secured.process.socket}") as session:
        assert session.step == 1


def test_the_name_to_expect_can_be_given(secured: Secured) -> None:
    """For a store that is reached by another name or through a tunnel."""
    with connect(secured.address, **secured.files(), tls_server_name="store.example"):
        pass


def test_credentials_of_grpc_are_taken_too(secured: Secured) -> None:
    """For what files cannot say."""
    credentials = grpc.ssl_channel_credentials(
        secured.servers.cert.read_bytes(),
        secured.trainer.key.read_bytes(),
        secured.trainer.cert.read_bytes(),
    )
    with connect(secured.address, credentials=credentials):
        pass


# ---------------------------------------------------------------------- who is not


def refusal(secured: Secured, **options: Any) -> str:
    """What a session is told; the next one is let in."""
    with pytest.raises(ProtocolError) as caught:
        connect(secured.address, **options)
    with connect(secured.address, **secured.files()):
        return str(caught.value)


def test_without_a_certificate_nobody_is_let_in(secured: Secured) -> None:
    """Knowing the store's CA is not enough."""
    said = refusal(secured, tls_ca=secured.servers.cert)

    assert "tls_client_ca has signed, and this session showed none: give tls_cert" in said


def test_a_certificate_of_another_authority_is_refused(secured: Secured) -> None:
    """Also of the one that signed for the store."""
    foreign = secured.servers.issue()

    said = refusal(secured, **secured.files(foreign))

    assert f"it refused {foreign.cert}; its log says why" in said


def test_a_trainer_that_speaks_plain_text_is_told_to_use_tls(secured: Secured) -> None:
    assert "speaks TLS, and this session did not; give tls_ca" in refusal(secured)


def test_a_store_of_another_authority_is_not_trusted(secured: Secured) -> None:
    """The trainer ends it, before its own certificate is shown."""
    said = refusal(secured, **{**secured.files(), "tls_ca": secured.trainers.cert})

    assert "its certificate does not hold for 127.0.0.1: unable to get local issuer" in said
    assert str(secured.trainers.cert) in said


def test_a_store_of_another_name_is_not_trusted(secured: Secured) -> None:
    """The message says which setting names it."""
    said = refusal(secured, **secured.files(), tls_server_name="other.example")

    assert "Hostname mismatch, certificate is not valid for 'other.example'" in said
    assert "tls_server_name says which name to expect" in said


def test_an_expired_certificate_is_refused_on_both_sides(secured: Secured) -> None:
    """The trainer does not try it; a store to which it is shown hangs up."""
    expired = secured.trainers.issue(days=EXPIRED)

    with pytest.raises(ConfigError, match="certificate has expired; renew it"):
        connect(secured.address, **secured.files(expired))

    credentials = grpc.ssl_channel_credentials(
        secured.servers.cert.read_bytes(), expired.key.read_bytes(), expired.cert.read_bytes()
    )
    target = process_address(secured.address)
    assert target is not None
    with (
        grpc.secure_channel(target, credentials) as channel,
        pytest.raises(grpc.RpcError) as caught,
    ):
        health(channel)
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE


def test_a_store_without_tls_is_named_as_such(make_store: MakeStore, secured: Secured) -> None:
    """A trainer that was given certificates never falls back to plain text."""
    process = StoreProcess(make_store(), "--tcp", "127.0.0.1:0", "--insecure")
    try:
        with pytest.raises(ProtocolError, match="does not speak TLS; start it with tls_cert"):
            connect(str(process.tcp), **secured.files())
    finally:
        process.kill()


def test_who_connects_and_says_nothing_is_sent_away(
    make_store: MakeStore, secured: Secured
) -> None:
    """After `hello_seconds`: the read ends instead of waiting for gRPC's two minutes."""
    own = secured.servers.issue("127.0.0.1")
    options = serve_options(own, secured.trainers)
    process = StoreProcess(make_store(), *options, "--hello-seconds", "0.5")
    try:
        host, port = str(process.tcp).removeprefix("tcp://").split(":")
        with socket.create_connection((host, int(port)), SECONDS) as raw:
            assert raw.recv(1) == b""
    finally:
        process.kill()


# ---------------------------------------------------------------------- files on disk


def test_a_session_and_its_store_take_renewed_certificates(
    make_store: MakeStore, recipe: Recipe, tmp_path: Path
) -> None:
    """A running store takes new CAs at once, a running session when it has to come back."""
    old, new = Authority(tmp_path, "old"), Authority(tmp_path, "new")
    store, trainer = old.issue("127.0.0.1"), old.issue()
    files: dict[str, Any] = {"tls_ca": old.cert, "tls_cert": trainer.cert, "tls_key": trainer.key}
    path = make_store()
    first = StoreProcess(path, *serve_options(store, old))
    again = None
    try:
        with connect(str(first.tcp), **files) as session:
            pair = Pair(session, make_oracle(recipe, INITIAL))
            pair.train(1)
            store.replace_with(new.issue("127.0.0.1"))
            trainer.replace_with(new.issue())
            put_in_place(old.cert, new.cert.read_bytes())

            fresh = new.issue()
            credentials = grpc.ssl_channel_credentials(
                new.cert.read_bytes(), fresh.key.read_bytes(), fresh.cert.read_bytes()
            )
            target = str(process_address(str(first.tcp)))
            with grpc.secure_channel(target, credentials) as channel:
                assert health(channel) == SERVING
            pair.train(1)  # the old connection goes on

            first.kill()
            again = StoreProcess(path, *serve_options(store, old, tcp=target))
            pair.train(1)
    finally:
        for process in (first, again):
            if process is not None:
                process.kill()


@pytest.mark.parametrize("spoiled", ["expired", "purpose", "missing", "open", "pair"])
def test_files_that_cannot_be_used_are_refused_at_the_start(
    make_store: MakeStore, tmp_path: Path, spoiled: str
) -> None:
    """Exit code 2 and one sentence, before there is a socket."""
    authority = Authority(tmp_path)
    own = authority.issue("127.0.0.1", days=EXPIRED) if spoiled == "expired" else authority.issue()
    part = {"expired": "has expired", "missing": "No such file", "open": "chmod 600"}
    part |= {"purpose": "purpose", "pair": "is not the key of"}
    match spoiled:
        case "purpose":
            own = authority.issue(purpose=CLIENT)
        case "missing":
            authority.cert.unlink()
        case "open":
            own.key.chmod(0o604)
        case "pair":
            own = Issued(own.cert, authority.issue().key)
    path = make_store()

    command = [str(ENGRAM_STORE), "serve", str(path), *serve_options(own, authority)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)

    assert run.returncode == 2
    assert part[spoiled] in run.stderr
    assert "Traceback" not in run.stderr
    assert not (path / "run" / "store.sock").exists()
