"""Shared memory between a store process and its trainers: who gets it, and what liars get."""

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import engram_store
from engram_store import slots, wire
from engram_store.errors import ProtocolError
from engram_store.recipes import Recipe
from engram_store.store import Store
from engram_store.v1 import store_pb2 as pb
from engram_store_client.remote import RemoteOptions, RemoteSession
from tests.pairs import INITIAL, MakeStore, Pair, make_oracle
from tests.servers import serving


@pytest.fixture
def store(make_store: MakeStore) -> Iterator[Store]:
    with engram_store.open(make_store(), "train") as opened:
        yield opened


@pytest.fixture
def address(store: Store, tmp_path: Path) -> Iterator[str]:
    with serving(store, f"unix:{tmp_path / 's.sock'}") as where:
        yield where


def door_of(address: str) -> str:
    return str(slots.slot_door(Path(address.removeprefix("unix:"))))


def knock(address: str, token: bytes) -> socket.socket:
    channel = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    channel.settimeout(5)
    channel.connect(door_of(address))
    channel.send(token)
    return channel


def test_the_session_says_what_it_uses(address: str) -> None:
    """Shared memory on one host, unless it is not wanted."""
    with RemoteSession(address) as session:
        assert session.transport == "shared memory"
    with RemoteSession(address, options=RemoteOptions(shared_memory=False)) as session:
        assert session.transport == "messages"


def test_training_is_the_same_through_both(address: str, store: Store, recipe: Recipe) -> None:
    """Bit for bit, one after the other on one store."""
    oracle = make_oracle(recipe, INITIAL)
    for shared in (True, False, True):
        with RemoteSession(address, options=RemoteOptions(shared_memory=shared)) as session:
            Pair(session, oracle).train(3)
    for layer, spec in store.tables.items():
        rows = store.read_rows(layer, np.arange(spec.rows, dtype=np.int32))
        assert rows.tobytes() == oracle.contents[layer].rows.tobytes()


@pytest.mark.parametrize("token", [b"x" * slots.TOKEN_BYTES, b"short", b"x" * 64])
def test_a_wrong_token_gets_nothing_and_disturbs_nobody(
    address: str, recipe: Recipe, token: bytes
) -> None:
    with RemoteSession(address) as session, knock(address, token) as stranger:
        assert slots.receive_packet(stranger, 0) is None
        Pair(session, make_oracle(recipe, INITIAL)).train(1)


def test_a_slot_that_was_never_sent_is_refused_and_the_store_lives(
    address: str, recipe: Recipe
) -> None:
    """A gradient that names memory the store does not have."""
    with RemoteSession(address) as session:
        window = session.announce(np.zeros((1, 8), np.int64), 0)
        rows, _ = window.rows(1)
        lie = wire.encode_array(
            np.zeros(rows.shape, np.float32),
            slots.SlotRange(99, 0, rows.size * 4, 1),
        )
        push = pb.Push(window=window.number, layer=1, gradients=lie)
        request = session.connection.send(pb.SessionRequest(push=push))
        with pytest.raises(ProtocolError, match=r"slot 99, which was never sent"):
            session.connection.result(request, "push")
        window.close()
        Pair(session, make_oracle(recipe, INITIAL)).train(1)


def test_memory_that_a_trainer_could_truncate_is_refused_and_the_store_lives(
    address: str, recipe: Recipe
) -> None:
    """An unsealed slot ends shared memory for that session, and nothing else."""
    with RemoteSession(address) as liar:
        stream = liar.connection.current_stream()
        assert stream.slots is not None
        channel = stream.slots.exchange._channel
        assert channel is not None
        fd = os.memfd_create("liar")
        os.ftruncate(fd, 8192)
        slots.send_slot(channel, 1, 4096, fd)
        os.close(fd)
    with RemoteSession(address) as session:
        Pair(session, make_oracle(recipe, INITIAL)).train(2)


def test_the_door_is_for_its_user_alone(address: str) -> None:
    assert Path(door_of(address)).stat().st_mode & 0o777 == 0o600
