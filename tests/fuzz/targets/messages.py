"""Messages of the wire, and what travels beside them in shared memory."""

import contextlib
import fcntl
import json
import mmap
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from google.protobuf.message import DecodeError
from numpy.typing import NDArray

from engram_store import errors, slots, wire
from engram_store.errors import ConfigError, EngramStoreError, ProtocolError
from engram_store.layout.create import table_specs
from engram_store.session import SnapshotRef
from engram_store.slots import SlotRange
from engram_store.v1 import store_pb2 as pb
from tests.fuzz.mutators import mutate_message
from tests.fuzz.samples import metadata, plain_recipe
from tests.fuzz.target import Target

_SLOT_BYTES = 64
_ANY_LENGTH = 2**64
"""What cannot be mapped is to be refused for that, not for a limit."""


def _read_slot(wanted: SlotRange) -> NDArray[np.uint8]:
    """A slot of 64 bytes, as each side reads the other's."""
    if wanted.slot != 1 or wanted.offset + wanted.length > _SLOT_BYTES:
        raise ProtocolError("no such slot")
    return np.zeros(_SLOT_BYTES, np.uint8)[wanted.offset : wanted.offset + wanted.length]


def _check_array(data: bytes) -> None:
    message = pb.Array.FromString(data)
    array = wire.decode_array(message, _read_slot)
    assert array.shape == tuple(message.shape)
    assert array.nbytes == len(message.data) or message.HasField("slot")
    assert not array.dtype.hasobject
    wire.decode_array(wire.encode_array(array))


def _arrays() -> Iterator[bytes]:
    for array in (
        np.arange(6, dtype="<i8").reshape(2, 3),
        np.ones((1, 2, 3, 2), "<f4"),
        np.zeros((0, 5), "<u2"),
        np.array([[True, False]]),
        np.array(3, "<i4"),
    ):
        yield wire.encode_array(array).SerializeToString()
    slot = SlotRange(slot=1, offset=16, length=48, sequence=2)
    yield wire.encode_array(np.zeros((2, 3), "<i8"), slot).SerializeToString()


def _check_failure(data: bytes) -> None:
    error = wire.decode_error(pb.Failure.FromString(data))
    assert isinstance(error, EngramStoreError)
    assert isinstance(str(error), str)
    assert isinstance(repr(error), str)
    again = wire.decode_error(wire.encode_error(error))
    assert type(again) is type(error)
    # What test runners and futures call on an error.
    assert error.with_traceback(None) is error
    error.add_note("seen")
    with contextlib.suppress(EngramStoreError):
        raise error


def _failures() -> Iterator[bytes]:
    for error in (
        errors.StepGapError(7, 3),
        errors.UnknownLayerError(9, [1, 3]),
        errors.TruncatedTableError("/store/rows", 3, 8),
        errors.StepTooLargeError(1, 2, 3, 4),
        errors.ShapeError("gradients", (2, 3), "[n, 4]"),
        EngramStoreError("no more than that"),
    ):
        yield wire.encode_error(error).SerializeToString()


def _welcome(recipe: Any, tables: Any) -> pb.Welcome:
    return pb.Welcome(
        protocol=wire.PROTOCOL,
        server_version="0.1.0",
        store_id=metadata().store_id,
        fingerprint=metadata().fingerprint,
        recipe_json=json.dumps(recipe.to_json()),
        tables_json=json.dumps([spec.to_json() for spec in tables]),
        token_map=None if recipe.token_map is None else wire.encode_array(recipe.token_map),
        step=7,
        slot_token=b"t" * slots.TOKEN_BYTES,
    )


def _check_welcome(data: bytes) -> None:
    from engram_store_client.remote.messages import read_welcome

    store_id, recipe, tables = read_welcome(pb.Welcome.FromString(data))
    assert isinstance(store_id, str)
    rows = {layer.layer: layer.stored_rows for layer in recipe.layers}
    assert rows == {layer: spec.rows for layer, spec in tables.items()}, "other tables"
    assert all(type(spec.dim) is int for spec in tables.values()), "a dim that is no whole number"


def _welcomes() -> Iterator[bytes]:
    yield _welcome(metadata().recipe, metadata().tables.values()).SerializeToString()
    specs = table_specs(plain_recipe(), dim=4, overrides={})
    yield _welcome(plain_recipe(), specs).SerializeToString()
    for tables_json in (
        "null",
        "[]",
        "[" * 5_000,
        json.dumps([{**specs[0].to_json(), "dim": 4.5}]),
    ):
        message = _welcome(plain_recipe(), specs)
        message.tables_json = tables_json
        yield message.SerializeToString()


def _check_request(data: bytes) -> None:
    """The arrays and names in a request, as a session decodes them.

    The live session behind it is left to a target of its own; see the README.
    """
    request = pb.SessionRequest.FromString(data)
    match request.WhichOneof("request"):
        case "announce":
            for array in (request.announce.tokens, request.announce.context):
                wire.decode_array(array, _read_slot)
        case "push":
            wire.decode_array(request.push.gradients, _read_slot)
        case "restore":
            wire.decode_ref(request.restore.snapshot)


def _requests() -> Iterator[bytes]:
    tokens, context = np.zeros((2, 4), np.int64), np.zeros((2, 1), np.int64)
    announce = pb.Announce(
        window=1, step=7, tokens=wire.encode_array(tokens), context=wire.encode_array(context)
    )
    yield pb.SessionRequest(id=1, announce=announce).SerializeToString()
    push = pb.Push(window=1, layer=3, gradients=wire.encode_array(np.ones((5, 4), np.float32)))
    yield pb.SessionRequest(id=2, push=push).SerializeToString()
    ref = wire.encode_ref(SnapshotRef(store_id=metadata().store_id, step=3, digest="ab" * 32))
    yield pb.SessionRequest(id=3, restore=pb.Restore(snapshot=ref)).SerializeToString()
    commit = pb.Commit(step=7, rates={1: 0.1, 3: 0.2}, gradient_scale=1.0, beta1=0.9, beta2=0.99)
    yield pb.SessionRequest(id=4, commit=commit).SerializeToString()


def _check_creation(data: bytes) -> None:
    """What a store is to be made of; nothing is made."""
    from engram_store_server.creation import decode_creation

    creation = decode_creation(pb.CreateStoreRequest.FromString(data))
    assert "/" not in creation.name
    assert len(creation.tables) == len(creation.recipe.layers)
    assert creation.full_bytes > 0


def _creations() -> Iterator[bytes]:
    options = {
        "dim": 4,
        "dtype": "float32",
        "optimizer": "adam",
        "stochastic_rounding": True,
        "on_nonfinite": "skip",
        "seed": 3,
        "initial": {"std": 0.02, "seed": 1},
    }
    for recipe, layer in ((metadata().recipe, 3), (plain_recipe(), 2)):
        yield pb.CreateStoreRequest(
            store="my.engram",
            recipe_json=json.dumps(recipe.to_json()),
            token_map=None if recipe.token_map is None else wire.encode_array(recipe.token_map),
            options_json=json.dumps({**options, "per_layer": {str(layer): {"dim": 8}}}),
        ).SerializeToString()


def _check_response(data: bytes) -> None:
    response = pb.SessionResponse.FromString(data)
    match response.WhichOneof("response"):
        case "failure":
            assert isinstance(wire.decode_error(response.failure), EngramStoreError)
        case "rows":
            for array in (response.rows.row_ids, response.rows.rows, response.rows.inverse):
                wire.decode_array(array, _read_slot)
        case "snapshot_taken":
            wire.decode_ref(response.snapshot_taken.snapshot)


def _responses() -> Iterator[bytes]:
    rows = pb.Rows(
        row_ids=wire.encode_array(np.arange(3, dtype=np.int32)),
        rows=wire.encode_array(np.zeros((3, 4), np.uint16)),
        inverse=wire.encode_array(np.zeros((1, 3, 2), np.int32)),
    )
    yield pb.SessionResponse(id=1, rows=rows).SerializeToString()
    failure = wire.encode_error(errors.StepGapError(7, 3))
    yield pb.SessionResponse(id=2, failure=failure).SerializeToString()
    ref = wire.encode_ref(SnapshotRef(store_id=metadata().store_id, step=3, digest="ab" * 32))
    taken = pb.SnapshotTaken(snapshot=ref)
    yield pb.SessionResponse(id=3, snapshot_taken=taken).SerializeToString()


def _check_slot(data: bytes) -> None:
    """A packet and descriptors through a real socket pair.

    The first byte: how many descriptors; the second: which kind; the third: the file's length
    as a power of two. The rest is the packet.
    """
    count, kind, power = (*data[:3], 0, 0, 0)[:3]
    before = _open_descriptors()
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    sent: list[int] = []
    try:
        sent = [_descriptor(kind, power) for _ in range(count % 4)]
        socket.send_fds(ours, [data[3:200]], sent)
        ours.close()
        slot = slots.receive_packet(theirs, _ANY_LENGTH)
        if isinstance(slot, bytes):
            assert not sent or not count % 4
        elif slot is not None:
            assert len(data[3:200]) == 16, "a packet of another length"
            assert slot.bytes.size == int.from_bytes(data[11:19], "little")
            assert not slot.bytes[:1].any()
            assert not slot.sequence
    finally:
        for fd in sent:
            os.close(fd)
        ours.close()
        theirs.close()
    del slot
    assert _open_descriptors() == before, "a descriptor was left open"


def _open_descriptors() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


def _descriptor(kind: int, power: int) -> int:
    if kind % 8 == 0:
        return os.open("/dev/null", os.O_RDWR)
    fd = os.memfd_create("fuzz", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, _file_bytes(power))
    if kind % 8 > 1:
        seals = (fcntl.F_SEAL_SHRINK, fcntl.F_SEAL_GROW, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals[min(kind % 8 - 2, 2)])
    return fd


def _file_bytes(power: int) -> int:
    """Content and the page behind it."""
    return min((1 << power % 63) + mmap.PAGESIZE, 2**63 - 1) if power else 0


def _packets() -> Iterator[bytes]:
    def packet(length: int, power: int, count: int = 1, kind: int = 7, extra: bytes = b"") -> bytes:
        return bytes([count, kind, power]) + slots._HEADER.pack(1, length) + extra

    yield packet(4096, 12)
    yield packet(4096, 12, extra=b"more")
    yield packet(4096, 12, count=2)
    yield packet(4096, 12, count=0)
    yield packet(0, 0)
    yield packet(4095, 12)
    for power in (40, 46, 60, 62):
        yield packet(1 << power, power)
    yield packet(4096, 12, kind=2)
    yield packet(4096, 12, kind=0)
    yield b"\1\7\14"


TARGETS = (
    Target(
        name="array",
        check=_check_array,
        seeds=_arrays,
        allowed=(ProtocolError, DecodeError),
        mutate=mutate_message(pb.Array),
    ),
    Target(
        name="failure",
        check=_check_failure,
        seeds=_failures,
        allowed=(DecodeError,),
        mutate=mutate_message(pb.Failure),
    ),
    Target(
        name="welcome",
        check=_check_welcome,
        seeds=_welcomes,
        allowed=(ConfigError, ProtocolError, DecodeError),
        mutate=mutate_message(pb.Welcome),
        needs=("grpc",),
    ),
    Target(
        name="session-request",
        check=_check_request,
        seeds=_requests,
        allowed=(ProtocolError, DecodeError),
        mutate=mutate_message(pb.SessionRequest),
    ),
    Target(
        name="creation",
        check=_check_creation,
        seeds=_creations,
        allowed=(ConfigError, ProtocolError, DecodeError),
        mutate=mutate_message(pb.CreateStoreRequest),
        needs=("grpc",),
    ),
    Target(
        name="session-response",
        check=_check_response,
        seeds=_responses,
        allowed=(ProtocolError, DecodeError),
        mutate=mutate_message(pb.SessionResponse),
    ),
    Target(name="slot", check=_check_slot, seeds=_packets, allowed=(ProtocolError,)),
)
