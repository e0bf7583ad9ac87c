"""Shared memory between two processes: what one side can do to the other."""

import fcntl
import mmap
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from engram_store.errors import ProtocolError
from engram_store.slots import Slot, make_slot, map_slot, peer_uid, receive_slot, send_slot

LENGTH = 8192
Channels = tuple[socket.socket, socket.socket]


@pytest.fixture
def channels() -> Iterator[Channels]:
    pair = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    yield pair
    for channel in pair:
        channel.close()


@pytest.fixture
def made() -> Iterator[tuple[Slot, int]]:
    slot, fd = make_slot(7, LENGTH)
    yield slot, fd
    os.close(fd)


def open_descriptors() -> set[str]:
    return {path.name for path in Path("/proc/self/fd").iterdir()}


def plain_memory(length: int = LENGTH, seals: int = 0) -> int:
    fd = os.memfd_create("test", os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, length)
    if seals:
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    return fd


def test_what_the_maker_writes_the_other_side_reads(
    channels: Channels, made: tuple[Slot, int]
) -> None:
    """Before and after the slot was handed over, without a copy."""
    ours, fd = made
    ours.bytes[:3] = (1, 2, 3)
    send_slot(channels[0], ours.number, LENGTH, fd)
    theirs = receive_slot(channels[1])
    assert theirs is not None
    assert theirs.number == 7
    ours.bytes[1] = 9
    np.testing.assert_array_equal(theirs.bytes[:3], (1, 9, 3))


def test_the_other_side_cannot_write_shrink_grow_or_unseal(made: tuple[Slot, int]) -> None:
    """Neither through its mapping nor through the descriptor."""
    _, fd = made
    theirs = map_slot(7, LENGTH, fd)
    assert not theirs.bytes.flags.writeable
    with pytest.raises(PermissionError):
        mmap.mmap(fd, LENGTH)
    for length in (0, LENGTH // 2, 2 * LENGTH):
        with pytest.raises(PermissionError):
            os.ftruncate(fd, length)
    with pytest.raises(PermissionError):
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)


def test_a_private_mapping_keeps_its_writes_to_itself(made: tuple[Slot, int]) -> None:
    """And goes on showing what the maker writes to pages it did not touch."""
    ours, fd = made
    theirs = map_slot(7, LENGTH, fd, private=True)
    theirs.bytes[0] = 5
    ours.bytes[mmap.PAGESIZE] = 6
    assert ours.bytes[0] == 0
    assert theirs.bytes[mmap.PAGESIZE] == 6


@pytest.mark.parametrize(
    "seals", [0, fcntl.F_SEAL_SHRINK, fcntl.F_SEAL_GROW], ids=["none", "shrink", "grow"]
)
def test_memory_that_can_be_taken_away_is_refused(seals: int) -> None:
    """Truncated under a mapping it would kill the process that reads it."""
    fd = plain_memory(seals=seals)
    with pytest.raises(ProtocolError, match="not sealed against"):
        map_slot(1, LENGTH, fd)
    os.close(fd)


@pytest.mark.parametrize("length", [0, LENGTH - 1, 2 * LENGTH])
def test_a_slot_of_another_length_is_refused(made: tuple[Slot, int], length: int) -> None:
    with pytest.raises(ProtocolError, match=f"{LENGTH} bytes, {length} were announced"):
        map_slot(7, length, made[1])


def test_files_and_pipes_are_no_slots() -> None:
    """Only sealed memory is mapped, whatever a descriptor is."""
    reading, writing = os.pipe()
    with pytest.raises(ProtocolError, match="not sealed memory"):
        map_slot(1, LENGTH, reading)
    os.close(reading)
    os.close(writing)


@pytest.mark.parametrize("message", [b"x", b"x" * 16, b"x" * 100])
def test_garbage_on_the_socket_is_refused(channels: Channels, message: bytes) -> None:
    """Bytes without a descriptor, or of another length."""
    channels[0].send(message)
    with pytest.raises(ProtocolError, match="are not a slot"):
        receive_slot(channels[1])


def test_a_refused_slot_leaves_no_descriptor_open(channels: Channels) -> None:
    fd = plain_memory()
    send_slot(channels[0], 1, LENGTH, fd)
    before = open_descriptors()
    with pytest.raises(ProtocolError):
        receive_slot(channels[1])
    assert open_descriptors() == before
    os.close(fd)


def test_a_side_that_hangs_up_is_told_from_one_that_sends(channels: Channels) -> None:
    channels[0].close()
    assert receive_slot(channels[1]) is None


def test_the_kernel_vouches_for_the_user_at_the_other_end(channels: Channels) -> None:
    assert peer_uid(channels[0]) == os.getuid()
